//! A session that is brought back from a backup lives another life: the same records at the same seqs, under another incarnation (spec
//! BACKUP-4). Whoever read the life before may have seen more than the backup has; nothing of what he holds is taken for this one's.

use super::chain::Chain;
use super::chunk::Chunk;
use super::state::{Damage, State};
use super::words::Incarnation;

/// Makes the chunks of one life into those of another, one after the other, and folds them.
#[derive(Debug)]
pub struct Rebirth {
    from: Incarnation,
    to: Incarnation,
    /// First seq and number of the next chunk.
    next: (u64, u64),
    /// The chain of the life before, as far as its chunks came.
    before: Chain,
    after: Chain,
    /// The state of the new life, once it is known: a trimmed session's is not below its snapshot.
    state: Option<State>,
    snapshot: Option<State>,
}

impl Rebirth {
    /// Brings a life back as `to`. Its first chunk that is kept has the seq and number `first`, behind the chain `before`; `snapshot` is
    /// needed where that is not the first one of all.
    pub fn new(from: Incarnation, to: Incarnation, first: (u64, u64), before: Chain, snapshot: Option<State>) -> Self {
        // Below the first chunk of all is nothing.
        let state = (first == (0, 0)).then(|| State::new(to));
        Self { from, to, next: first, before, after: Chain::start(to), state, snapshot }
    }

    /// The next chunk, as the new life has it: without what bound instances to keys, and with a chain of its own.
    ///
    /// Errors: damage at the chunk's first seq if it is of another life, is not the next one, or its chain is not that of its entries.
    pub fn chunk(&mut self, chunk: &Chunk) -> Result<Chunk, Damage> {
        let header = chunk.header();
        let damage = |what| Damage { seq: header.first, what };
        if header.incarnation != self.from {
            return Err(damage("chunk belongs to another incarnation"));
        }
        if (header.first, header.number) != self.next {
            return Err(damage("a chunk is missing"));
        }
        self.awake();
        self.before = chunk.verify_chain(self.before)?;
        let reborn = chunk.reborn(self.to, self.after).map_err(|error| damage(error.detail))?;
        self.after = reborn.header().chain;
        self.next = (chunk.end(), header.next_number());
        if let Some(state) = &mut self.state {
            state.apply(&reborn)?;
        }
        Ok(reborn)
    }

    /// The state behind the last chunk. Errors: damage if the chunks do not reach it.
    pub fn finish(mut self) -> Result<State, Damage> {
        self.awake();
        self.state.ok_or(Damage { seq: self.next.0, what: "the snapshot behind a trim is missing" })
    }

    /// Where the snapshot is reached, the state is known.
    fn awake(&mut self) {
        let reached = |state: &mut State| (state.tail(), state.number()) == self.next && state.chain() == self.before;
        if self.state.is_none() {
            self.state = self.snapshot.take_if(reached).map(|state| state.reborn(self.to, self.after));
        }
    }
}
