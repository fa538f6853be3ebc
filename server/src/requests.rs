//! Requests that concern no single session: one QUIC stream each.

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_LISTED;
use mainstay_protocol::session::Operation;
use mainstay_protocol::wire::{Body, Detail, Error, Frame, List, Listed, ListedSession};
use mainstay_transport::SendStream;

use crate::connection::Conn;
use crate::sessions::refusal;

/// Answers LIST with the sessions that the caller may read.
pub(crate) async fn list(conn: &Conn, request: List, send: &mut impl SendStream) {
    let answer = page(conn, request).await.unwrap_or_else(|refusal| {
        Frame::from(Error {
            about: List::KIND,
            id: 0,
            code: refusal.code,
            value: refusal.value,
            detail: Detail::new(refusal.detail),
        })
    });
    // A client that left needs no answer.
    if send.write(&mut [answer.to_bytes()]).await.is_ok() {
        send.finish();
    } else {
        send.reset(Code::NO_ERROR.0);
    }
}

async fn page(conn: &Conn, request: List) -> Result<Frame, mainstay_protocol::session::Refusal> {
    conn.author()?;
    let limit = usize::try_from(request.limit).unwrap_or(MAX_LISTED).clamp(1, MAX_LISTED);
    let store = &conn.server.sessions().store;
    let page = store.list(request.prefix.to_vec(), request.after.to_vec(), limit).await.map_err(|e| refusal(&e))?;
    let sessions = page
        .sessions
        .into_iter()
        .filter(|stat| conn.allow(Operation::Read, &stat.session.name).is_ok())
        .map(|stat| ListedSession {
            name: stat.session.name,
            incarnation: stat.session.incarnation,
            created: stat.created,
            first: stat.first,
            tail: stat.tail,
        })
        .collect();
    Ok(Listed { sessions, next: if page.more { page.after.into() } else { bytes::Bytes::new() } }.into())
}
