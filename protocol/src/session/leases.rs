//! Leases of members: how long somebody counts as here without a sign of life (spec PRES-4).

use std::collections::HashMap;
use std::sync::Arc;

use super::view::View;
use super::words::Author;

#[derive(Debug)]
struct Lease {
    generation: u64,
    grace: u64,
    /// Then it is looked at again.
    until: u64,
}

/// Who is held present until when, in milliseconds of a clock that only ever goes forward. Nothing of it is stored: a server
/// that starts gives everybody a grace to come back.
#[derive(Debug, Default)]
pub struct Leases {
    held: HashMap<Arc<Author>, Lease>,
    /// What the members had seen when they were looked at.
    seen: Option<u64>,
}

/// How long a departure may take to become durable before it is asked for again, in milliseconds.
const AGAIN: u64 = 1000;

impl Leases {
    /// Holds exactly the members of the durable view; those that are new from `now` on. True if somebody came or went.
    pub fn follow(&mut self, view: &View, now: u64) -> bool {
        let members = view.members();
        if self.seen == Some(members.changes()) {
            return false;
        }
        self.seen = Some(members.changes());
        self.held.retain(|author, lease| members.get(author).is_some_and(|m| m.generation == lease.generation));
        for (author, member) in members.iter() {
            self.held.entry(author.clone()).or_insert_with(|| Lease {
                generation: member.generation,
                grace: member.grace,
                until: now.saturating_add(member.grace),
            });
        }
        true
    }

    /// True if nobody is here.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// When [`Leases::lapsed`] may find somebody.
    pub fn deadline(&self) -> Option<u64> {
        self.held.values().map(|lease| lease.until).min()
    }

    /// Members of whom nothing was heard for their grace, with their generations. `heard` says when a member was heard last.
    pub fn lapsed(&mut self, now: u64, heard: impl Fn(&Author) -> Option<u64>) -> Vec<(Arc<Author>, u64)> {
        let mut lapsed = Vec::new();
        for (author, lease) in &mut self.held {
            if lease.until > now {
                continue;
            }
            let alive = heard(author).map_or(0, |at| at.saturating_add(lease.grace));
            if alive > now {
                lease.until = alive;
            } else {
                lapsed.push((author.clone(), lease.generation));
                // It goes once its departure is durable.
                lease.until = now.saturating_add(AGAIN);
            }
        }
        lapsed
    }
}
