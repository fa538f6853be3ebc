//! Arbitrary bytes as frames: nothing panics, and memory stays a small multiple of the input.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::wire::{Deframer, Frame};

fuzz_target!(|data: &[u8]| {
    let mut frames = Deframer::new(1 << 20);
    frames.push(Bytes::copy_from_slice(data));
    while let Ok(Some(raw)) = frames.next_frame() {
        let _ = Frame::decode(&raw);
    }
});
