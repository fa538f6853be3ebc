//! What is large, and snapshots, wait behind what is small, and nothing is lost by that.

mod log;

use bytes::Bytes;
use mainstay_store::{Outcome, Store, StoreError};
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

/// Large snapshots of many sessions are asked for at once, and then something small is appended to each of these sessions, which waits for no
/// snapshot, not even its own. Nor do a writer that is opened and a session that is deleted: what is not taken by then is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_appends_overtake_large_snapshots_of_their_own_session() {
    const SESSIONS: usize = 48;
    const LARGE: usize = 1 << 20;
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let store = FjallStore::open(&dir, Config::default()).unwrap();
    let mut logs = Vec::new();
    for n in 0..SESSIONS as u8 + 2 {
        let mut log = Log::create(&store, &format!("s-{n}"), n + 1).await;
        assert_eq!(log.append(&store, noise(1, 10)).await, Outcome::Committed);
        logs.push(log);
    }
    let (tell, order) = std::sync::mpsc::channel();
    let chunks: Vec<_> = logs.iter().map(|log| log.next(noise(2, 100))).collect();
    let states: Vec<Bytes> = (0..logs.len() as u64).map(|n| noise(n + 1, LARGE).into()).collect();
    let snapshots: Vec<_> =
        logs.iter().zip(&states).map(|(log, state)| store.put_snapshot(&log.writer, state.clone())).collect();
    let opened = store.open_writer(logs[SESSIONS].id.clone());
    let deleted = store.delete(logs[SESSIONS + 1].id.clone());
    let appends: Vec<_> =
        logs.iter().zip(chunks).take(SESSIONS).map(|(log, chunk)| store.append(&log.writer, chunk, None)).collect();
    let mut waiting = tokio::task::JoinSet::new();
    for (n, snapshot) in snapshots.into_iter().enumerate() {
        let tell = tell.clone();
        waiting.spawn(async move {
            match snapshot.await {
                Ok(()) => tell.send("snapshot").unwrap(),
                Err(StoreError::Fenced { .. }) if n == SESSIONS => {}
                Err(StoreError::NotFound) if n == SESSIONS + 1 => {}
                Err(error) => panic!("snapshot {n}: {error}"),
            }
        });
    }
    for append in appends {
        let tell = tell.clone();
        waiting.spawn(async move {
            assert_eq!(append.await, Outcome::Committed);
            tell.send("append").unwrap();
        });
    }
    opened.await.unwrap();
    deleted.await.unwrap();
    drop((tell, store));
    while let Some(done) = waiting.join_next().await {
        done.unwrap();
    }
    let order: Vec<&str> = order.iter().collect();
    let last = order.iter().rposition(|what| *what == "append").unwrap();
    assert!(order[last..].iter().filter(|what| **what == "snapshot").count() >= SESSIONS / 8, "{order:?}");
    let store = FjallStore::open(&dir, Config::default()).unwrap();
    for (n, log) in logs.iter().enumerate().take(SESSIONS) {
        assert_eq!(store.stat(log.id.name.clone()).await.unwrap().unwrap().tail, 2, "{}", log.id);
        let kept = store.snapshot(log.id.clone()).await.unwrap().unwrap();
        assert!(kept == states[n], "{}", log.id);
    }
    let kept = store.snapshot(logs[SESSIONS].id.clone()).await.unwrap();
    assert!(kept.is_none_or(|kept| kept == states[SESSIONS]));
    assert!(store.stat(logs[SESSIONS + 1].id.name.clone()).await.unwrap().is_none());
}
