//! Arbitrary histories of runs, signals and requests against the reference model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_protocol::testing::runs::{Op, run};

fuzz_target!(|data: &[u8]| {
    if data.len() <= 2048 {
        run(&Op::from_bytes(data));
    }
});
