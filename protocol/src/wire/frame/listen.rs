//! LISTEN: asks for signals ahead of the data that they are behind (spec SIG-6).

plain_frame! {
    /// Sent on an attachment. Answered by an EARLY for each pending signal, and for each record of that kind from then on.
    Listen = 0x60, {
        /// Seq of the first signal that the client does not know.
        from: u64,
    }
}
