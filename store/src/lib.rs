//! The durability contract: what a storage engine promises, in prose and as the trait [`Store`].
//!
//! # The contract
//!
//! A store keeps *sessions*. A session has a name and one life at a time, its incarnation. It is a sequence of *chunks*,
//! numbered densely from 0; chunks hold records with dense seqs. What is inside a chunk is no concern of the engine,
//! except that it checks what it reads.
//!
//! 1. **Atomicity.** One chunk of one session is the only atomic unit. It is stored whole or not at all. Nothing is
//!    promised across chunks or sessions.
//! 2. **Order.** The chunk `n` is stored only after every chunk below `n` of the same session is durable. At most one append
//!    per session is in flight.
//! 3. **Durability.** [`Outcome::Committed`] is said only after the chunk survives a crash of the process, of the machine
//!    and a loss of power.
//! 4. **Visibility.** A read never returns a chunk that is not durable. What was read once is never read differently, but for
//!    compaction.
//! 5. **Fencing.** A writer is exclusive. [`Store::open_writer`] grants the next writer epoch durably, and from its return on
//!    no append of an older writer takes effect.
//! 6. **Honest outcomes.** An append ends as `Committed`, `NotCommitted` or `Unknown`. `Unknown` is resolved by
//!    [`Store::resolve`], which reads; it is never guessed. Between `Unknown` and its resolution the writer appends nothing.
//! 7. **Damage is loud.** A read checks checksums, density and links. What does not fit is [`StoreError::Damaged`] with the
//!    first seq that cannot be trusted; it is never skipped or cut off. Damage to one session does not affect another.
//! 8. **Names.** Of several creates of one name at once, one wins and the others learn the winner's incarnation. Once a delete was
//!    answered the name is free; the old incarnation never comes back. Requests about different incarnations are in no order before
//!    they are answered.
//! 9. **Trim.** Whole chunks below a position may be removed. Until then they may still be read.
//! 10. **Wake.** With each chunk the writer says when the session has something to write by itself. The store remembers the last that
//!     it was told, with the chunk or by [`Store::set_wake`], and finds those that are due; it does nothing about them.
//!
//! 11. **Compaction.** One chunk may take the place of several that a single read returned, if it begins and ends where they do (spec
//!     COMPACT). It is stored whole, and they are gone, or neither. How far that has come is remembered, too.
//!
//! Snapshots are a help, not a truth: losing one costs time, unless the chunks before it were trimmed, which is why a
//! trim needs one.
//!
//! [`MemoryStore`] is the executable model of this text; the `testing` feature holds the suite that every engine
//! passes, and `FaultyStore`, which makes any engine fail on purpose.

pub mod backup;
mod contract;
mod memory;
#[cfg(feature = "testing")]
pub mod testing;

pub use contract::{
    Committing, Created, Health, ListPage, Outcome, Page, Pending, ReadFrom, SessionId, SessionStat, Store, StoreError,
    Writer,
};
pub use memory::MemoryStore;
