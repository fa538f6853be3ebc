//! fjall's journals before fjall reads them: nothing panics, nothing is set aside for lengths that lie.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| mainstay_store_fjall::fuzzing::journal(data));
