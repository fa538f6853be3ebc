//! Tokens from strangers: nothing panics, and none that was not signed verifies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_server::auth::{Keyring, SigningKey, read};
use std::sync::OnceLock;

fuzz_target!(|data: &[u8]| {
    static KEYRING: OnceLock<Keyring> = OnceLock::new();
    let keyring = KEYRING.get_or_init(|| Keyring::new([SigningKey::generate().expect("a key").verifying_key()]));
    let _ = read(data);
    assert!(keyring.verify(data, 0).is_err());
});
