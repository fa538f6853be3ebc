//! Backups and what is brought back from them, while the store is used.

mod log;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstay_protocol::session::{Incarnation, SessionName, State};
use mainstay_store::backup::{BackupError, BackupReader, SavedSession};
use mainstay_store::{Outcome, SessionId, Store};
use mainstay_store_fjall::backup::{LeftOut, Restored, TransferError, check};
use mainstay_store_fjall::{Config, FjallStore, verify};

use crate::log::{Log, noise};

/// Name, first seq, tail and hash of the view of each session, and its incarnation; all of it without damage.
fn look(dir: &Path) -> BTreeMap<String, (u64, u64, String, Incarnation)> {
    let mut seen = BTreeMap::new();
    let report = verify::verify(dir, &mut |name, found| {
        if let verify::Found::Session { state, .. } = found {
            let facts = (state.first(), state.tail(), state.view().hash().to_string(), state.incarnation());
            seen.insert(name.to_string(), facts);
        }
        ControlFlow::Continue(())
    });
    assert_eq!(report.unwrap().problems, []);
    seen
}

fn on(_: mainstay_store::backup::Totals) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn backup(store: &FjallStore) -> Vec<u8> {
    let mut bytes = Vec::new();
    let saved = store.backup(&mut bytes, &mut on).unwrap();
    assert_eq!((saved.left_out.as_slice(), saved.totals.bytes), (&[][..], bytes.len() as u64));
    assert_eq!(check(BackupReader::new(&bytes[..]).unwrap(), &mut on).unwrap(), saved.totals);
    bytes
}

fn restore(store: &FjallStore, backup: &[u8]) -> Result<Restored, TransferError> {
    store.restore(BackupReader::new(backup).unwrap(), &|_| true, 5000, &mut on)
}

fn small_segments() -> Config {
    let mut config = Config::default();
    config.segment_bytes = 64 * 1024;
    config
}

/// Sessions as they may be: trimmed in a segment, and of everything; with a snapshot, and without; empty; expiring.
async fn filled(dir: &Path) -> FjallStore {
    let store = FjallStore::open(dir, small_segments()).unwrap();
    for (life, (name, records, trim)) in
        [("empty", 0, 0), ("plain", 80, 0), ("trimmed", 80, 40), ("all", 20, 20)].into_iter().enumerate()
    {
        let mut log = Log::create(&store, name, life as u8 + 1).await;
        for n in 0..records {
            assert_eq!(log.append(&store, noise(n, 2000)).await, Outcome::Committed);
            if n + 1 == trim + 30 || n + 1 == trim {
                store.put_snapshot(&log.writer, log.state.snapshot()).await.unwrap();
            }
        }
        if trim > 0 {
            store.trim(&log.writer, trim).await.unwrap();
        }
    }
    let id = SessionId { name: SessionName::new("expires").unwrap(), incarnation: Incarnation([9; 16]) };
    store.create(id, 1000, 60_000).await.unwrap();
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_saved_comes_back_as_other_lives_of_the_same_sessions() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (temp.path().join("old"), temp.path().join("new"));
    let store = filled(&old).await;
    let (store, backup) = tokio::task::spawn_blocking(move || {
        let bytes = backup(&store);
        (store, bytes)
    })
    .await
    .unwrap();
    drop(store);
    let again = FjallStore::open(&new, small_segments()).unwrap();
    let bytes = backup.clone();
    let (again, restored) = tokio::task::spawn_blocking(move || {
        let restored = restore(&again, &bytes).unwrap();
        (again, restored)
    })
    .await
    .unwrap();
    assert_eq!(restored, Restored { sessions: 5, records: 80 + 40, ..Restored::default() });
    // What is there is left as it is.
    let (again, taken) = tokio::task::spawn_blocking(move || {
        let restored = restore(&again, &backup).unwrap();
        (again, restored)
    })
    .await
    .unwrap();
    assert_eq!((taken.sessions, taken.taken, taken.left_out.len()), (0, 5, 5));
    // It expires as one that was used when it came back.
    assert_eq!(again.due(64_999, 10).await.unwrap(), []);
    let due = again.due(65_000, 10).await.unwrap();
    assert_eq!(due.iter().map(|stat| stat.session.name.as_str()).collect::<Vec<_>>(), ["expires"]);
    // It goes on behind what it was.
    let stat = again.stat(SessionName::new("trimmed").unwrap()).await.unwrap().unwrap();
    assert_eq!((stat.first, stat.tail), (40, 80));
    let state = State::restore(&again.snapshot(stat.session.clone()).await.unwrap().unwrap()).unwrap();
    let mut log = Log::open(&again, stat.session, state).await.unwrap();
    assert_eq!((log.id.name.as_str(), log.writer.epoch), ("trimmed", 2));
    assert_eq!(log.append(&again, noise(0, 100)).await, Outcome::Committed);
    drop(again);
    let (was, mut is) = (look(&old), look(&new));
    is.get_mut("trimmed").unwrap().1 -= 1;
    is.get_mut("trimmed").unwrap().2 = was["trimmed"].2.clone();
    assert_eq!(was.len(), 5);
    for (name, (first, tail, hash, incarnation)) in &was {
        let other = &is[name];
        assert_eq!((first, tail, hash), (&other.0, &other.1, &other.2), "{name}");
        assert_ne!(*incarnation, other.3, "{name} is another life");
    }
}

/// Spec BACKUP-2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_a_busy_store_holds_what_was_acknowledged_before_and_nothing_in_halves() {
    let temp = tempfile::tempdir().unwrap();
    let store = Arc::new(FjallStore::open(&temp.path().join("store"), small_segments()).unwrap());
    let over = Arc::new(AtomicBool::new(false));
    let mut acknowledged = Vec::new();
    let mut writing = Vec::new();
    for n in 0..4u8 {
        let count = Arc::new(AtomicU64::new(0));
        acknowledged.push(count.clone());
        let (store, over) = (store.clone(), over.clone());
        let mut log = Log::create(&store, &format!("s{n}"), n + 1).await;
        writing.push(tokio::spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let next = log.state.tail();
                assert_eq!(log.append(&store, noise(next, 500)).await, Outcome::Committed);
                count.store(next + 1, Ordering::Release);
                if next % 50 == 49 {
                    store.put_snapshot(&log.writer, log.state.snapshot()).await.unwrap();
                }
                if next % 200 == 199 {
                    store
                        .trim(&log.writer, next - 100)
                        .await
                        .or_else(|error| error.is_retryable().then_some(()).ok_or(error))
                        .unwrap();
                }
            }
        }));
    }
    let now = |all: &[Arc<AtomicU64>]| all.iter().map(|count| count.load(Ordering::Acquire)).collect::<Vec<_>>();
    for round in 0..5 {
        while now(&acknowledged).iter().any(|count| *count < (round + 1) * 120) {
            tokio::task::yield_now().await;
        }
        let before = now(&acknowledged);
        let saving = store.clone();
        let bytes = tokio::task::spawn_blocking(move || backup(&saving)).await.unwrap();
        let after = now(&acknowledged);
        let dir = temp.path().join(format!("round{round}"));
        let again = FjallStore::open(&dir, small_segments()).unwrap();
        let restored = tokio::task::spawn_blocking(move || restore(&again, &bytes).unwrap()).await.unwrap();
        assert_eq!(restored.sessions, 4);
        for (n, (_, tail, _, _)) in look(&dir).into_values().enumerate() {
            // One append may be on its way.
            assert!((before[n]..=after[n] + 1).contains(&tail), "s{n}: {tail} of {}..={}", before[n], after[n] + 1);
        }
    }
    over.store(true, Ordering::Relaxed);
    for writing in writing {
        writing.await.unwrap();
    }
}

/// Spec BACKUP-3.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_cut_short_or_changed_is_known_as_such_and_brings_no_half_of_a_session() {
    let temp = tempfile::tempdir().unwrap();
    let store = filled(&temp.path().join("old")).await;
    let whole = tokio::task::spawn_blocking(move || backup(&store)).await.unwrap();
    let step = whole.len() / 97;
    for at in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
        let cut = BackupReader::new(&whole[..at]).map_err(TransferError::from).and_then(|from| check(from, &mut on));
        let expected = matches!(
            cut,
            Err(TransferError::Backup(BackupError::Cut(n))) if n == at as u64
        ) || at < 18 && matches!(cut, Err(TransferError::Backup(BackupError::NotABackup)));
        assert!(expected, "{at}: {cut:?}");
        let mut changed = whole.clone();
        changed[at] ^= 1 << (at % 8);
        let read = BackupReader::new(&changed[..]).map_err(TransferError::from).and_then(|from| check(from, &mut on));
        assert!(matches!(read, Err(TransferError::Backup(_))), "{at}: {read:?}");
    }
    // Somebody who does not look first has what came before.
    let dir = temp.path().join("new");
    let again = FjallStore::open(&dir, small_segments()).unwrap();
    let half = whole[..whole.len() / 2].to_vec();
    let result = tokio::task::spawn_blocking(move || {
        let result = restore(&again, &half).map(drop);
        (again, result)
    });
    let (again, result) = result.await.unwrap();
    assert!(matches!(result, Err(TransferError::Backup(BackupError::Cut(_)))), "{result:?}");
    drop(again);
    let before = look(&temp.path().join("old"));
    let there = look(&dir);
    assert!(!there.is_empty() && there.len() < before.len(), "{}", there.len());
    assert!(there.iter().all(|(name, facts)| before[name].1 == facts.1));
}

/// Spec BACKUP-5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_while_sessions_come_back_leaves_each_whole_or_not_at_all() {
    let temp = tempfile::tempdir().unwrap();
    let store = FjallStore::open(&temp.path().join("old"), small_segments()).unwrap();
    // Several steps each.
    for (life, name) in ["first", "second"].into_iter().enumerate() {
        let mut log = Log::create(&store, name, life as u8 + 1).await;
        for n in 0..30 {
            assert_eq!(log.append(&store, noise(n, 100_000)).await, Outcome::Committed);
        }
    }
    let whole = tokio::task::spawn_blocking(move || backup(&store)).await.unwrap();
    let dir = temp.path().join("new");
    let again = FjallStore::open(&dir, small_segments()).unwrap();
    let (copies, from) = (temp.path().join("copies"), dir.clone());
    let taken = tokio::task::spawn_blocking(move || {
        let (mut taken, mut told) = (0, 0);
        let mut copy_now = |_: mainstay_store::backup::Totals| {
            // What a crash leaves is what was written before: nothing is written while this is copied.
            if told % 7 == 0 {
                copy(&from, &copies.join(taken.to_string()));
                taken += 1;
            }
            told += 1;
            ControlFlow::Continue(())
        };
        again.restore(BackupReader::new(&whole[..]).unwrap(), &|_| true, 5000, &mut copy_now).unwrap();
        taken
    });
    let taken = taken.await.unwrap();
    let before = look(&temp.path().join("old"));
    let mut partly = 0;
    for n in 0..taken {
        let dir = temp.path().join("copies").join(n.to_string());
        let there = look(&dir);
        assert!(there.iter().all(|(name, facts)| before[name].1 == facts.1), "copy {n}");
        let left = |dir: &Path| verify::verify(dir, &mut |_, _| ControlFlow::Continue(())).unwrap().leftovers;
        partly += u64::from(left(&dir) > 0);
        // The next start removes what was on its way, while nobody asks for anything.
        for _ in 0..100 {
            if left(&dir) == 0 {
                break;
            }
            let store = FjallStore::open(&dir, small_segments()).unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            drop(store);
        }
        assert_eq!(left(&dir), 0, "copy {n}");
    }
    assert!(partly > 0, "no copy was taken while a session was on its way");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if let Err(error) = fs::copy(entry.path(), &target) {
            // A table that was compacted away meanwhile.
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_damaged_is_left_out_and_named() {
    let temp = tempfile::tempdir().unwrap();
    let new = temp.path().join("new");
    let store = FjallStore::open(&temp.path().join("old"), small_segments()).unwrap();
    let mut log = Log::create(&store, "strange", 50).await;
    assert_eq!(log.append(&store, noise(1, 30)).await, Outcome::Committed);
    let mut whole = Vec::new();
    let mut broken = mainstay_store::backup::BackupWriter::new(&mut whole).unwrap();
    let saved = SavedSession {
        name: SessionName::new("broken").unwrap(),
        incarnation: Incarnation([60; 16]),
        created: 1,
        expire_after: 0,
        writer_epoch: 1,
        released: 0,
        compaction: Default::default(),
        first: (0, 0),
        chain: mainstay_protocol::session::Chain::start(Incarnation([60; 16])),
    };
    let chunk = log.next(noise(2, 10));
    // It was told to be broken; has a chunk of another session; ends too early.
    broken.session(&saved).unwrap();
    broken.broken(3, "stored data is damaged").unwrap();
    broken.session(&saved).unwrap();
    broken.chunk(chunk.bytes()).unwrap();
    broken.whole(1, 1).unwrap();
    broken.session(&saved).unwrap();
    broken.whole(1, 1).unwrap();
    // Says of itself what cannot be.
    for strange in [
        SavedSession { first: (5, 0), ..saved.clone() },
        SavedSession { released: 1, ..saved.clone() },
        SavedSession { writer_epoch: mainstay_protocol::wire::MAX_VARINT, ..saved.clone() },
    ] {
        broken.session(&strange).unwrap();
        broken.whole(strange.first.0, 0).unwrap();
    }
    // And is whole.
    broken.session(&saved).unwrap();
    broken.whole(0, 0).unwrap();
    broken.finish().unwrap();
    let again = FjallStore::open(&new, small_segments()).unwrap();
    let restored = tokio::task::spawn_blocking(move || restore(&again, &whole).unwrap()).await.unwrap();
    let why = |what: &str| LeftOut { session: "broken".into(), why: what.into() };
    assert_eq!(
        restored.left_out,
        [
            why("damaged at seq 0: the backup does not have it whole"),
            why("damaged at seq 1: chunk belongs to another incarnation"),
            why("damaged at seq 1: chunks are missing at the end"),
            why("damaged at seq 5: the snapshot behind a trim is missing"),
            why("damaged at seq 0: what is said of it is not of a session of this length"),
            why("damaged at seq 0: what is said of it is not of a session of this length"),
        ]
    );
    assert_eq!((restored.sessions, restored.broken), (1, 6));
    assert_eq!(look(&new).len(), 1);
}
