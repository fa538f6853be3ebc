//! Requests that concern no single session: one QUIC stream each.

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_LISTED;
use mainstay_protocol::session::{Delegated, Delegator, Refusal, Stretch};
use mainstay_protocol::wire::{Body, Detail, Error, Frame, List, Listed, ListedSession, Mint, Minted};
use mainstay_transport::{SendStream, entropy};

use crate::auth::Claims;
use crate::connection::Conn;
use crate::load::Work;
use crate::quota::Cost;
use crate::sessions::refusal;

/// Answers LIST with the sessions that the caller may read.
pub(crate) async fn list(conn: &Conn, request: List, send: &mut impl SendStream) {
    answer(conn, List::KIND, page(conn, request).await, send).await;
}

/// Answers MINT with a narrower token (spec AUTH-9).
pub(crate) async fn mint(conn: &Conn, request: Mint, send: &mut impl SendStream) {
    answer(conn, Mint::KIND, minted(conn, request), send).await;
}

fn minted(conn: &Conn, request: Mint) -> Result<Frame, Refusal> {
    let (verified, _) = conn.verified()?;
    conn.charge(Cost::Lookup)?;
    let space = conn.space()?;
    let anchors = space.trust.anchors();
    let key = anchors.minting().ok_or(Refusal::new(Code::FORBIDDEN, "this server makes no tokens"))?;
    let claims = &verified.claims;
    // By a key that is no more than believed a token is not passed on: what it made is revoked with it, and what that made would not be.
    if claims.root_key.is_some() && verified.key != key.verifying_key().id() {
        return Err(Refusal::new(Code::FORBIDDEN, "the token was made by a key that makes no tokens any more"));
    }
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
        // As old as what it was made from: what revokes that by its time revokes this.
        ..Claims::new(subject, request.grants, claims.issued, expires)
    };
    let token = key.mint(&claims).map_err(|error| {
        tracing::debug!(%error, "no token was made");
        Refusal::new(Code::LIMIT_EXCEEDED, "the token would be too long")
    })?;
    space.sessions.metrics.minted.inc();
    tracing::info!(subject = %claims.subject, "token made");
    Ok(Minted { token: token.into(), expires: expires.max(0) as u64 }.into())
}

async fn answer(conn: &Conn, about: u64, answer: Result<Frame, Refusal>, send: &mut impl SendStream) {
    if answer.is_err() {
        conn.linger().await;
    }
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
    let mut found: Vec<ListedSession> = Vec::new();
    let mut next = bytes::Bytes::new();
    // Names that are not the caller's are not looked at: where a page ends is told, too.
    for stretch in conn.readable(&String::from_utf8_lossy(&request.prefix))? {
        let (prefix, exact) = match stretch {
            Stretch::Name(name) => (name.into_bytes(), true),
            Stretch::Under(prefix) => (prefix.into_bytes(), false),
        };
        let room = if exact { 1 } else { limit - found.len() };
        // One that is all before the page has nothing behind `after`.
        if exact && prefix[..] <= request.after[..] {
            continue;
        }
        let page = store.list(prefix.clone(), request.after.to_vec(), room).await.map_err(|error| refusal(&error))?;
        let theirs = page.sessions.into_iter().filter(|stat| !exact || stat.session.name.as_str().as_bytes() == prefix);
        found.extend(theirs.map(|stat| ListedSession {
            name: stat.session.name,
            incarnation: stat.session.incarnation,
            created: stat.created,
            first: stat.first,
            tail: stat.tail,
        }));
        if !exact && page.more {
            // Of one that is damaged the name is told as well.
            next = page.after.into();
            break;
        }
        if let Some(last) = found.last().filter(|_| found.len() >= limit) {
            next = bytes::Bytes::copy_from_slice(last.name.as_str().as_bytes());
            break;
        }
    }
    Ok(Listed { sessions: found, next }.into())
}
