//! Arbitrary histories of the session authority against the reference model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_protocol::testing::log::{Op, run};

fuzz_target!(|data: &[u8]| {
    if data.len() <= 2048 {
        run(&Op::from_bytes(data));
    }
});
