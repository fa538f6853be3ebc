//! What decodes has one encoding: encoding it and decoding again gives the same frame and the same bytes.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::wire::{Deframer, Frame};

fn decode(bytes: Bytes) -> Option<Frame> {
    let mut frames = Deframer::new(1 << 20);
    frames.push(bytes);
    Frame::decode(&frames.next_frame().ok()??).ok()?
}

fuzz_target!(|data: &[u8]| {
    let Some(frame) = decode(Bytes::copy_from_slice(data)) else { return };
    let bytes = frame.to_bytes();
    // Ignorable parameters that nobody knows are dropped, so that the bytes may be fewer, never more.
    assert!(bytes.len() <= data.len());
    let again = decode(bytes.clone());
    assert_eq!(again.as_ref(), Some(&frame));
    assert_eq!(again.map(|frame| frame.to_bytes()), Some(bytes));
});
