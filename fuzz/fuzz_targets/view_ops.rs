//! Arbitrary histories of messages and shared state against the reference model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_protocol::testing::view::{Op, run};

fuzz_target!(|data: &[u8]| {
    if data.len() <= 2048 {
        run(&Op::from_bytes(data));
    }
});
