//! Space that comes back, also while the store is busy.

mod log;

use std::ops::ControlFlow;
use std::time::Duration;

use mainstay_store::{Outcome, Store};
use mainstay_store_fjall::{Config, FjallStore, verify};

use crate::log::{Log, noise};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_trimmed_and_deleted_sessions_go_while_others_are_appended_to() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let mut config = Config::default();
    config.segment_bytes = 64 * 1024;
    let store = FjallStore::open(&dir, config).unwrap();
    let mut busy = Log::create(&store, "busy", 1).await;
    let mut trimmed = Log::create(&store, "trimmed", 2).await;
    let mut twice = Log::create(&store, "twice", 3).await;
    let mut deleted = Log::create(&store, "deleted", 4).await;
    for n in 0..100 {
        for log in [&mut trimmed, &mut twice, &mut deleted] {
            assert_eq!(log.append(&store, noise(n, 2000)).await, Outcome::Committed);
        }
    }
    let mut appended = 0;
    // Never a pause of more than a commit.
    let mut keep_busy = async |rounds: usize| {
        for _ in 0..rounds {
            appended += 1;
            assert_eq!(busy.append(&store, noise(appended, 100)).await, Outcome::Committed);
        }
    };
    for log in [&trimmed, &twice] {
        store.put_snapshot(&log.writer, log.state.snapshot()).await.unwrap();
    }
    store.trim(&trimmed.writer, 55).await.unwrap();
    // In the middle of a segment, and then all of it, with a sweep between.
    store.trim(&twice.writer, 10).await.unwrap();
    keep_busy(300).await;
    store.delete(twice.id.clone()).await.unwrap();
    store.delete(deleted.id.clone()).await.unwrap();
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        keep_busy(50).await;
    }
    drop(store);
    let mut chunks = 0;
    let report = verify::verify(&dir, &mut |_, found| {
        chunks += u64::from(matches!(found, verify::Found::Chunk { .. }));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(report.problems, []);
    assert_eq!((report.sessions, report.chunks), (2, chunks));
    assert_eq!(chunks, appended + 45, "only what was not trimmed or deleted is there");
    assert_eq!(report.leftovers, 0, "chunks that nothing refers to");
}
