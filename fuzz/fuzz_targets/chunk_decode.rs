//! Chunks, snapshots and views from a disk: nothing panics, and what decodes is consistent. The checksum is made right, so that
//! the parser behind it is reached.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::session::{Chain, Chunk, Incarnation, State, View};

fuzz_target!(|data: &[u8]| {
    let bytes = Bytes::copy_from_slice(data);
    if let Ok(state) = State::restore_kept(&bytes, 1) {
        assert_eq!(State::restore(&state.snapshot()).map(|state| state.snapshot()).ok(), Some(state.snapshot()));
    }
    let _ = View::decode(&bytes);
    let Some(body) = data.get(8..) else { return };
    let mut sealed = Chunk::checksum(body).to_be_bytes().to_vec();
    sealed.extend_from_slice(body);
    let Ok(chunk) = Chunk::decode(sealed.into()) else { return };
    let _ = chunk.verify_chain(Chain::start(Incarnation([0xab; 16])));
    let _ = State::new(chunk.header().incarnation).apply(&chunk);
    let _ = chunk.frame();
    assert_eq!(chunk.delivery().spans.iter().map(|span| span.count).sum::<u64>(), chunk.header().kept());
    // They end with the first that is no record.
    let records = chunk.records().take_while(Result::is_ok).count() as u64;
    assert!(records <= chunk.header().kept());
});
