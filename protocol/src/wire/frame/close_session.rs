//! CLOSE_SESSION: no record may follow (spec SESS-14).

plain_frame! {
    /// Sent on the attachment. The server appends `session.closed` and answers CLOSED, also if it is closed already.
    CloseSession = 0x26, {}
}
