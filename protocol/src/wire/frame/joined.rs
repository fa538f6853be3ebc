//! JOINED: the caller is a member (spec PRES-1).

plain_frame! {
    /// Answers JOIN.
    Joined = 0x46, {
        /// Seq of the record with which the member joined.
        generation: u64,
    }
}
