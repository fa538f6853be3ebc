//! A session that is known whole, brought back: from its first chunk, and from somewhere behind a trim.

use std::sync::Arc;

use crate::session::{Chain, Chunk, Control, Incarnation, Rebirth, State};

/// The life that it is brought back to.
const AGAIN: Incarnation = Incarnation([0xee; 16]);

/// Brings `stored` back, kept from chunk `kept` on, with the snapshot behind chunk `saved`, and looks whether it is the same session.
///
/// # Panics
///
/// If it is another one.
pub fn check(stored: &[Arc<Chunk>], kept: usize, saved: usize) {
    let Some(start) = stored.first().map(|chunk| State::new(chunk.header().incarnation)) else { return };
    let folded = |end: usize| {
        let Ok(mut state) = State::restore(&start.snapshot()) else { panic!("a snapshot does not restore") };
        stored[..end].iter().for_each(|chunk| assert_eq!(state.apply(chunk), Ok(())));
        state
    };
    let (base, whole) = (folded(kept), folded(stored.len()));
    let from = start.incarnation();
    let begin = |snapshot| Rebirth::new(from, AGAIN, (base.tail(), base.number()), base.chain(), snapshot);
    let snapshot = || (kept > 0).then(|| folded(saved.max(kept)));
    let mut rebirth = begin(snapshot());
    let mut chain = Chain::start(AGAIN);
    for chunk in &stored[kept..] {
        let Ok(reborn) = rebirth.chunk(chunk) else { panic!("a chunk that follows is refused") };
        let Ok(read) = Chunk::decode(reborn.bytes().clone()) else { panic!("a chunk does not decode") };
        assert_eq!((read.header(), read.region()), (reborn.header(), reborn.region()));
        let Ok(after) = read.verify_chain(chain) else { panic!("the chain is not that of the entries") };
        chain = after;
        let (is, was) = (read.header(), chunk.header());
        assert_eq!(read.region(), chunk.region());
        assert_eq!((is.incarnation, is.first, is.number), (AGAIN, was.first, was.number));
        assert_eq!((&is.authors, &is.producers, &is.batches), (&was.authors, &was.producers, &was.batches));
        assert_eq!((is.writer_epoch, is.base_time, &is.compacted), (was.writer_epoch, was.base_time, &was.compacted));
        let left = was.controls.iter().filter(|entry| !matches!(entry, Control::Resume { .. }));
        assert!(is.controls.iter().eq(left));
    }
    let Ok(state) = rebirth.finish() else { panic!("its state is not known") };
    assert_eq!((state.incarnation(), state.chain(), state.wake()), (AGAIN, chain, whole.wake()));
    // Nobody is bound to a key in it.
    assert_eq!(state.snapshot(), whole.reborn(AGAIN, chain).snapshot());
    let [first, second, ..] = &stored[kept..] else { return };
    assert!(begin(snapshot()).chunk(second).is_err(), "a chunk is missing");
    let mut twice = begin(snapshot());
    assert!(twice.chunk(first).is_ok() && twice.chunk(first).is_err(), "a chunk comes twice");
    let mut elsewhere = Rebirth::new(AGAIN, from, (base.tail(), base.number()), base.chain(), None);
    assert!(elsewhere.chunk(first).is_err(), "it is of another life");
    let mut linked = Rebirth::new(from, AGAIN, (base.tail(), base.number()), Chain::start(AGAIN), None);
    assert!(linked.chunk(first).is_err(), "it does not link");
    if kept > 0 {
        let mut unknown = begin(None);
        stored[kept..].iter().for_each(|chunk| assert!(unknown.chunk(chunk).is_ok()));
        assert!(unknown.finish().is_err(), "what was trimmed is in no chunk");
    }
}
