"""Networks behind one interface: x_0_hat = f(x_t, t, cond)."""
