//! Resume tokens from strangers: nothing panics, and none that this server did not seal opens.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_protocol::session::{Author, ClientKey, Incarnation, Instance, ResumeToken};
use mainstay_protocol::wire::Subject;
use mainstay_server::ResumeKeys;
use std::sync::OnceLock;

fuzz_target!(|data: &[u8]| {
    static SEALED: OnceLock<(ResumeKeys, Vec<u8>)> = OnceLock::new();
    let (keys, sealed) = SEALED.get_or_init(|| {
        let keys = ResumeKeys::generate().expect("a key");
        let author = Author { subject: Subject::new("somebody").expect("a subject"), instance: Instance([1; 16]) };
        let token = ResumeToken { incarnation: Incarnation([2; 16]), author, key: ClientKey([3; 32]), generation: 4 };
        let sealed = keys.seal(&token).expect("sealed").into_bytes();
        (keys, sealed)
    });
    assert!(keys.open(data).is_err());
    // The same laid over a token that is good: what is left of that opens only if nothing was changed.
    let mut laid = sealed.clone();
    for (byte, over) in laid.iter_mut().zip(data) {
        *byte ^= over;
    }
    assert_eq!(keys.open(&laid).is_ok(), laid == *sealed);
});
