//! Decoding takes memory for what came, not for what its lengths say (spec WIRE-5).

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::session::{CheckedBatch, Chunk, Record, Records, State, View};
use mainstay_protocol::wire::{Deframer, Frame, Writer};
use tikv_jemalloc_ctl::thread::allocatedp;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Bytes that `work` allocates on this thread, freed or not.
fn allocated<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let counter = allocatedp::read().expect("jemalloc counts");
    let before = counter.get();
    let result = work();
    (result, counter.get() - before)
}

/// How many times its own length a decoder may allocate for an input, and what it may take for an empty one. The most memory
/// for a byte takes a list of the shortest entries, each of which has a few words.
const TIMES: u64 = 24;
const FIXED: u64 = 4096;

fn inputs() -> Vec<Vec<u8>> {
    ["frames", "records", "chunks", "states"].into_iter().flat_map(vectors).collect()
}

/// The golden and malformed vectors of a file.
fn vectors(file: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/../spec/vectors/{file}.toml", env!("CARGO_MANIFEST_DIR"));
    let vectors: toml::Table = std::fs::read_to_string(path).expect("vectors").parse().expect("TOML");
    let vectors = vectors.values().filter_map(|list| list.as_array()).flatten();
    let bytes = vectors.map(|vector| {
        let hex = vector["hex"].as_str().expect("bytes");
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
        (0..hex.len()).step_by(2).map(byte).collect()
    });
    bytes.collect()
}

/// Every way in for bytes of a peer or a file.
fn decode_all(bytes: &Bytes) {
    let mut frames = Deframer::new(1 << 20);
    frames.push(bytes.clone());
    while let Ok(Some(raw)) = frames.next_frame() {
        // What is wrong is refused; here only its cost counts.
        let _ = Frame::decode(&raw);
    }
    let _ = View::decode(bytes);
    let _ = State::restore(bytes);
    let _ = Chunk::decode(bytes.clone());
    // What a wrong checksum would keep from being looked at.
    if let Some(body) = bytes.get(8..) {
        let _ = Chunk::decode([&Chunk::checksum(body).to_be_bytes()[..], body].concat().into());
    }
    Records::new(bytes).for_each(drop);
    let _ = CheckedBatch::new(1, bytes.clone());
}

#[test]
fn decoding_allocates_a_small_multiple_of_its_input_whatever_the_lengths_say() {
    let mut most = 0.0f64;
    let mut check = |bytes: Vec<u8>| {
        let bytes = Bytes::from(bytes);
        let ((), cost) = allocated(|| decode_all(&bytes));
        let len = bytes.len() as u64;
        most = most.max(cost as f64 / (len + FIXED / TIMES) as f64);
        assert!(cost <= FIXED + TIMES * len, "{cost} bytes allocated for {len}: {bytes:02x?}");
    };
    let inputs = inputs();
    assert!(inputs.len() > 100);
    for input in inputs {
        check(input.clone());
        // Lengths and counts that lie, at every place where one may stand.
        for at in 0..input.len() {
            for lie in [&[0xbf, 0xff, 0xff, 0xff][..], &[0xff; 8], &[0x7f, 0xff], &[0x3f]] {
                let mut lying = input.clone();
                lying.splice(at..at + 1, lie.iter().copied());
                check(lying);
            }
        }
    }
    // A count that the bytes which follow could hold if each entry were one of them.
    for input in vectors("chunks") {
        for at in 8..input.len() {
            let mut lying = input.clone();
            lying.splice(at..at + 1, [0x80, 0x00, 0xea, 0x60]);
            lying.resize(lying.len() + 60_000, 0);
            check(lying);
        }
    }
    println!("at most {most:.1} times the input");
}

#[test]
fn a_frame_that_announces_more_than_the_limit_is_refused_before_anything_is_set_aside() {
    let mut frames = Deframer::new(4096);
    let ((), cost) = allocated(|| frames.push(Bytes::from_static(&[0x36, 0xbf, 0xff, 0xff, 0xff, 0x00])));
    let (refused, more) = allocated(|| frames.next_frame());
    assert_eq!(refused.expect_err("refused").code, Code::FRAME_TOO_LARGE);
    assert!(cost + more < FIXED, "{cost} + {more} bytes for a length");
}

#[test]
fn a_region_of_small_records_costs_what_it_holds() {
    let mut w = Writer::new();
    for _ in 0..1000 {
        Record::data(0, &b"x"[..]).put(&mut w);
    }
    let region = w.freeze();
    let len = region.len() as u64;
    let (batch, cost) = allocated(|| CheckedBatch::new(1000, region));
    batch.expect("a batch");
    assert!(cost <= len, "{cost} bytes for {len}");
}
