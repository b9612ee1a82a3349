"""`flashdmd doctor`: a run's memory, before anything is loaded."""
