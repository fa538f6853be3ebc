//! A simulated UDP network for quinn.
