//! DELETED: the answer to DELETE_SESSION (spec SESS-16).

plain_frame! {
    /// The session is deleted durably.
    Deleted = 0x2c, {}
}
