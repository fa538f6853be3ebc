//! What is large waits behind what is small, and nothing is lost by that.

mod log;

use mainstay_store::{Outcome, Store};
use mainstay_store_fjall::{Config, FjallStore};

use crate::log::{Log, noise};

/// Many times what a turn takes is asked for at once, then something small, then the store is told to stop: the small ones are answered
/// before the last of the large ones, and everything is there afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_appends_overtake_large_ones_and_all_are_stored_before_the_store_stops() {
    const LARGE: usize = 24;
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let store = FjallStore::open(&dir, Config::default()).unwrap();
    let mut large = Vec::new();
    let mut small = Vec::new();
    for n in 0..LARGE as u8 {
        large.push(Log::create(&store, &format!("large-{n}"), n + 1).await);
        small.push(Log::create(&store, &format!("small-{n}"), n + 100).await);
    }
    for log in large.iter_mut().chain(&mut small) {
        assert_eq!(log.append(&store, noise(1, 10)).await, Outcome::Committed);
    }
    let (tell, order) = std::sync::mpsc::channel();
    let mut waiting = tokio::task::JoinSet::new();
    let asked = large.iter().map(|log| ("large", log, 200_000)).chain(small.iter().map(|log| ("small", log, 100)));
    let asked: Vec<_> = asked.map(|(what, log, bytes)| (what, &log.writer, log.next(noise(2, bytes)))).collect();
    let committing: Vec<_> =
        asked.into_iter().map(|(what, writer, chunk)| (what, store.append(writer, chunk, None))).collect();
    for (what, committing) in committing {
        let tell = tell.clone();
        waiting.spawn(async move {
            assert_eq!(committing.await, Outcome::Committed);
            tell.send(what).unwrap();
        });
    }
    drop((tell, store));
    while let Some(done) = waiting.join_next().await {
        done.unwrap();
    }
    let order: Vec<&str> = order.iter().collect();
    let last_small = order.iter().rposition(|what| *what == "small").unwrap();
    assert!(order[last_small..].iter().filter(|what| **what == "large").count() >= LARGE / 2, "{order:?}");
    let store = FjallStore::open(&dir, Config::default()).unwrap();
    for log in large.iter().chain(&small) {
        assert_eq!(store.stat(log.id.name.clone()).await.unwrap().unwrap().tail, 2, "{}", log.id);
    }
}
