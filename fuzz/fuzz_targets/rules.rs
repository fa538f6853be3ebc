//! The rules of a connection, driven by arbitrary events.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_protocol::testing::rules::run;

fuzz_target!(|data: &[u8]| run(data));
