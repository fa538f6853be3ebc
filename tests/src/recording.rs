//! What a network did to a run, so that it can do the same again.
//!
//! A recording says of each flow, in the order in which they appeared, and of each of its directions, what became of the first datagram, the
//! second, and so on; and after how many datagrams of the client its address changed. Replayed, the n-th datagram has the fate of the n-th. It is
//! a file of JSON lines:
//!
//! ```text
//! {"flow":0,"up":true,"after_us":30211}       {"flow":0,"up":false}                      lost
//! {"flow":0,"up":true,"after_us":5,"twice":true}    {"flow":0,"rebind":"127.0.0.7","at":1200}
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_transport::sim::Fate;
use serde::{Deserialize, Serialize};

/// Lines that are kept at most: hours of a phone, some hundred megabytes.
const LONGEST: usize = 8 << 20;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Rebind {
        flow: usize,
        rebind: IpAddr,
        /// After so many datagrams of the client.
        at: u64,
    },
    Datagram {
        flow: usize,
        up: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after_us: Option<u64>,
        #[serde(default, skip_serializing_if = "core::ops::Not::not")]
        twice: bool,
    },
}

#[derive(Debug, Default)]
struct State {
    /// What happened.
    lines: Vec<Line>,
    /// What is to happen: fates by flow and direction, and addresses by flow.
    fates: HashMap<(usize, bool), VecDeque<Fate>>,
    rebinds: HashMap<usize, VecDeque<(u64, IpAddr)>>,
    /// Datagrams of clients so far, by flow.
    sent: HashMap<usize, u64>,
    flows: usize,
    /// What happens is not kept.
    forgetful: bool,
}

/// A recording that is made, or replayed, or both.
#[derive(Debug, Default)]
pub struct Recording(Mutex<State>);

impl Recording {
    /// One of nothing, that keeps nothing.
    pub(crate) fn none() -> Self {
        Self(Mutex::new(State { forgetful: true, ..State::default() }))
    }

    /// One that is replayed. Errors: the file cannot be read, or is none.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut state = State::default();
        for line in std::fs::read_to_string(path)?.lines() {
            match serde_json::from_str(line)? {
                Line::Rebind { flow, rebind, at } => state.rebinds.entry(flow).or_default().push_back((at, rebind)),
                Line::Datagram { flow, up, after_us, twice } => {
                    let fate = Fate { after: after_us.map(Duration::from_micros), twice };
                    state.fates.entry((flow, up)).or_default().push_back(fate);
                }
            }
        }
        Ok(Self(Mutex::new(state)))
    }

    /// Writes what happened. Errors: the file system.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = String::new();
        for line in &self.lock().lines {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        std::fs::write(path, text)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a flow that has just appeared.
    pub(crate) fn flow(&self) -> usize {
        let mut state = self.lock();
        state.flows += 1;
        state.flows - 1
    }

    /// What becomes of the next datagram of a flow: what the recording says, or what is decided where it says nothing more.
    pub(crate) fn fate(&self, flow: usize, up: bool, decide: impl FnOnce() -> Fate) -> Fate {
        let mut state = self.lock();
        let fate = state.fates.get_mut(&(flow, up)).and_then(VecDeque::pop_front).unwrap_or_else(decide);
        let after_us = fate.after.map(|after| u64::try_from(after.as_micros()).unwrap_or(u64::MAX));
        state.note(Line::Datagram { flow, up, after_us, twice: fate.twice });
        if up {
            *state.sent.entry(flow).or_default() += 1;
        }
        fate
    }

    /// The address that a flow has from now on, if the recording says so.
    pub(crate) fn rebind(&self, flow: usize) -> Option<IpAddr> {
        let mut state = self.lock();
        let sent = state.sent.get(&flow).copied().unwrap_or(0);
        let (_, ip) = state.rebinds.get_mut(&flow)?.pop_front_if(|(at, _)| *at <= sent)?;
        Some(ip)
    }

    /// A flow has another address.
    pub(crate) fn rebound(&self, flow: usize, rebind: IpAddr) {
        let mut state = self.lock();
        let at = state.sent.get(&flow).copied().unwrap_or(0);
        state.note(Line::Rebind { flow, rebind, at });
    }
}

impl State {
    fn note(&mut self, line: Line) {
        if !self.forgetful && self.lines.len() < LONGEST {
            self.lines.push(line);
        }
    }
}
