//! CONFIGURED: the session treats runs and inputs as asked (spec RUN-2).

plain_frame! {
    /// Answers CONFIGURE.
    Configured = 0x50, {
        /// Seq of the record that says so.
        seq: u64,
    }
}
