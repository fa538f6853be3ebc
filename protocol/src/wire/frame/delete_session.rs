//! DELETE_SESSION: removes a session (spec SESS-16).

plain_frame! {
    /// Sent on the attachment. Answered by DELETED; then every attachment to this incarnation ends with `SESSION_GONE`.
    DeleteSession = 0x2a, {}
}
