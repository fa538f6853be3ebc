//! Requests that concern no single session: one QUIC stream each.

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_LISTED;
use mainstay_protocol::session::{Delegated, Delegator, Operation, Refusal};
use mainstay_protocol::wire::{Body, Detail, Error, Frame, List, Listed, ListedSession, Mint, Minted};
use mainstay_transport::{SendStream, entropy};

use crate::auth::Claims;
use crate::connection::Conn;
use crate::load::Work;
use crate::quota::Cost;
use crate::sessions::refusal;

/// Answers LIST with the sessions that the caller may read.
pub(crate) async fn list(conn: &Conn, request: List, send: &mut impl SendStream) {
    answer(List::KIND, page(conn, request).await, send).await;
}

/// Answers MINT with a narrower token (spec AUTH-9).
pub(crate) async fn mint(conn: &Conn, request: Mint, send: &mut impl SendStream) {
    answer(Mint::KIND, minted(conn, request), send).await;
}

fn minted(conn: &Conn, request: Mint) -> Result<Frame, Refusal> {
    let (verified, _) = conn.verified()?;
    conn.charge(Cost::Lookup)?;
    let space = conn.space()?;
    let anchors = space.trust.anchors();
    let key = anchors.minting().ok_or(Refusal::new(Code::FORBIDDEN, "this server makes no tokens"))?;
    let claims = &verified.claims;
    let delegator = Delegator {
        subject: &claims.subject,
        grants: &claims.grants,
        expires: claims.expires,
        depth: claims.ancestors.len(),
    };
    let now = conn.server.now_seconds();
    let Delegated { subject, expires } = delegator.delegate(&request.name, &request.grants, request.lasts, now)?;
    // What is bound stays bound: who has only a copy of the token makes none that is good elsewhere.
    let device = match (claims.device, request.device) {
        (Some(_), None) => claims.device,
        (_, asked) => asked,
    };
    let id: [u8; 16] = entropy::random();
    let claims = Claims {
        device,
        certificate: claims.certificate,
        id: Some(id.iter().map(|byte| format!("{byte:02x}")).collect()),
        ancestors: claims.ancestors.iter().chain([&verified.id]).cloned().collect(),
        root_key: Some(claims.root_key.clone().unwrap_or_else(|| verified.key.clone())),
        ..Claims::new(subject, request.grants, now, expires)
    };
    let token = key.mint(&claims).map_err(|error| {
        tracing::debug!(%error, "no token was made");
        Refusal::new(Code::LIMIT_EXCEEDED, "the token would be too long")
    })?;
    space.sessions.metrics.minted.inc();
    tracing::info!(subject = %claims.subject, "token made");
    Ok(Minted { token: token.into(), expires: expires.max(0) as u64 }.into())
}

async fn answer(about: u64, answer: Result<Frame, Refusal>, send: &mut impl SendStream) {
    let answer = answer.unwrap_or_else(|refusal| {
        let Refusal { code, value, detail } = refusal;
        Frame::from(Error { about, id: 0, code, value, detail: Detail::new(detail) })
    });
    // A client that left needs no answer.
    if send.write(&mut [answer.to_bytes()]).await.is_ok() {
        send.finish();
    } else {
        send.reset(Code::NO_ERROR.0);
    }
}

async fn page(conn: &Conn, request: List) -> Result<Frame, Refusal> {
    conn.author()?;
    conn.server.load.admit(Work::History)?;
    conn.charge(Cost::Lookup)?;
    let limit = usize::try_from(request.limit).unwrap_or(MAX_LISTED).clamp(1, MAX_LISTED);
    let store = &conn.sessions()?.store;
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
