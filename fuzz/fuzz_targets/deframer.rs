//! The same bytes in any pieces give the same frames and the same error.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::wire::{Deframer, RawFrame};

fn all(pieces: &[&[u8]]) -> (Vec<RawFrame>, Option<u64>, bool) {
    let mut frames = Deframer::new(4096);
    let mut seen = Vec::new();
    for piece in pieces {
        frames.push(Bytes::copy_from_slice(piece));
        loop {
            match frames.next_frame() {
                Ok(Some(frame)) => seen.push(frame),
                Ok(None) => break,
                Err(error) => return (seen, Some(error.code.0), false),
            }
        }
    }
    let border = frames.is_at_border();
    (seen, None, border)
}

fuzz_target!(|data: &[u8]| {
    let Some((&step, data)) = data.split_first() else { return };
    let whole = all(&[data]);
    let pieces: Vec<&[u8]> = data.chunks(usize::from(step % 32) + 1).collect();
    assert_eq!(all(&pieces), whole);
    let bytes: Vec<&[u8]> = data.chunks(1).collect();
    assert_eq!(all(&bytes), whole);
});
