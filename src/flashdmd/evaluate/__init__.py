"""Measuring pictures: every number says what decided it, and rows of two protocols do not mix."""
