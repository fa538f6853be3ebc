//! The damage that was measured to go unnoticed in fjall alone, or to keep it from opening: what was acknowledged is intact,
//! or the loss is reported.

mod log;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mainstay_protocol::session::{Incarnation, SessionName, State};
use mainstay_store::{Outcome, ReadFrom, SessionId, Store, StoreError};
use mainstay_store_fjall::{Config, FjallStore, OpenError, verify};

use crate::log::{Log, noise};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn used(bytes: &[u8]) -> usize {
    bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count()
}

/// A store whose log is one journal, with where each of its batches ends, and the witness file as it was before the last.
struct Image {
    _temp: tempfile::TempDir,
    dir: PathBuf,
    ends: Vec<usize>,
    witness_before: Vec<u8>,
    payloads: Vec<Vec<u8>>,
}

impl Image {
    fn journal(dir: &Path) -> PathBuf {
        let journals = fs::read_dir(dir.join("log")).unwrap().flatten().map(|entry| entry.path());
        let mut journals: Vec<_> = journals.filter(|path| path.extension().is_some_and(|e| e == "jnl")).collect();
        assert_eq!(journals.len(), 1, "one journal");
        journals.remove(0)
    }

    async fn make(payload: usize) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("store");
        let store = FjallStore::open(&dir, Config::default()).unwrap();
        let mut log = Log::create(&store, "s", 1).await;
        let (mut ends, mut payloads, mut witness_before) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..20 {
            witness_before = fs::read(dir.join("witness")).unwrap();
            let payload = noise(n + 1, payload);
            assert_eq!(log.append(&store, payload.clone()).await, Outcome::Committed);
            payloads.push(payload);
            ends.push(used(&fs::read(Self::journal(&dir)).unwrap()));
        }
        // As a crash leaves it: the store is copied while it is open.
        let crashed = temp.path().join("crashed");
        copy(&dir, &crashed);
        drop(store);
        Self { _temp: temp, dir: crashed, ends, witness_before, payloads }
    }

    /// What becomes of a copy whose journal `damage` changed; `acked` says whether the last batch was acknowledged. The
    /// payloads that a store opened there has, or if it does not open the seq from which on `verify` says they are gone.
    async fn with(&self, acked: bool, damage: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<Vec<u8>>, Option<u64>> {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("store");
        copy(&self.dir, &dir);
        let journal = Self::journal(&dir);
        let mut bytes = fs::read(&journal).unwrap();
        damage(&mut bytes);
        fs::write(&journal, bytes).unwrap();
        if !acked {
            fs::write(dir.join("witness"), &self.witness_before).unwrap();
        }
        let verified = verify::verify(&dir, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let store = match FjallStore::open(&dir, Config::default()) {
            Ok(store) => store,
            Err(OpenError::Damaged(what)) => {
                assert!(!verified.problems.is_empty(), "the start reports {what:?}, and verify does not");
                let named = verified.problems.iter().find(|problem| problem.session.as_deref() == Some("s"));
                return Err(named.and_then(|problem| problem.seq));
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(verified.problems, [], "verify reports what the start does not");
        let id = SessionId { name: SessionName::new("s").unwrap(), incarnation: Incarnation([1; 16]) };
        let mut payloads = Vec::new();
        loop {
            let page = store.read(id.clone(), ReadFrom::Seq(payloads.len() as u64), 1 << 20).await.unwrap();
            for chunk in &page.chunks {
                payloads.extend(chunk.records().map(|record| record.unwrap().3.payload.to_vec()));
            }
            if payloads.len() as u64 >= page.tail {
                return Ok(payloads);
            }
        }
    }

    fn all_but_last(&self) -> &[Vec<u8>] {
        &self.payloads[..self.payloads.len() - 1]
    }

    fn last(&self) -> core::ops::Range<usize> {
        self.ends[self.ends.len() - 2]..self.ends[self.ends.len() - 1]
    }
}

#[tokio::test]
async fn a_torn_tail_that_nobody_was_told_of_opens_without_it() {
    for payload in [40, 6000] {
        let image = Image::make(payload).await;
        assert_eq!(image.with(false, |_| {}).await, Ok(image.payloads.clone()), "stored, though nobody was told");
        let last = image.last();
        for at in [1, 5, 12, 13, 20, last.len() / 2, last.len() - 13, last.len() - 5, last.len() - 1] {
            let cut = image.with(false, |bytes| bytes.truncate(last.start + at)).await;
            assert_eq!(cut.as_deref(), Ok(image.all_but_last()), "cut after {at} bytes of a batch of {payload}");
            let zeroed = image.with(false, |bytes| bytes[last.start + at..].fill(0)).await;
            assert_eq!(zeroed.as_deref(), Ok(image.all_but_last()), "zeroed after {at} bytes of a batch of {payload}");
        }
    }
}

#[tokio::test]
async fn any_pages_of_an_unacknowledged_batch_may_be_lost() {
    let image = Image::make(32 * 1024).await;
    let last = image.last();
    let pages: Vec<usize> = (last.start / 4096 + 1..last.end / 4096).collect();
    assert!(pages.len() >= 6);
    for page in &pages {
        let lost = image.with(false, |bytes| bytes[page * 4096..(page + 1) * 4096].fill(0)).await;
        assert_eq!(lost.as_deref(), Ok(image.all_but_last()), "page {page} lost");
    }
    for mask in [0b10101u32, 0b01010, 0b11100, 0b00111] {
        let lost = image.with(false, |bytes| {
            for (bit, page) in pages.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1) {
                let _ = bit;
                bytes[page * 4096..(page + 1) * 4096].fill(0);
            }
        });
        assert_eq!(lost.await.as_deref(), Ok(image.all_but_last()), "pages {mask:b} lost");
    }
}

#[tokio::test]
async fn a_torn_tail_that_was_acknowledged_is_reported() {
    let image = Image::make(40).await;
    let last = image.last();
    for at in [0, 1, 13, last.len() / 2, last.len() - 1] {
        let cut = image.with(true, |bytes| bytes.truncate(last.start + at)).await;
        assert!(cut.is_err(), "cut after {at} bytes of an acknowledged batch");
        let zeroed = image.with(true, |bytes| bytes[last.start + at..].fill(0)).await;
        assert!(zeroed.is_err(), "zeroed after {at} bytes of an acknowledged batch");
    }
}

#[tokio::test]
async fn every_flipped_bit_of_a_batch_in_the_middle_is_reported_or_harmless() {
    let image = Image::make(40).await;
    // Every field of the batch: markers, count, sequence number, types, lengths, keys, values, checksum, trailer.
    let batch = image.ends[9]..image.ends[10];
    let mut harmless = 0;
    for (at, bit) in batch.clone().flat_map(|at| [(at, at % 8), (at, (at + 3) % 8)]) {
        match image.with(true, |bytes| bytes[at] ^= 1 << bit).await {
            // A sequence number that is too high shows at the next batch.
            Err(Some(11)) if (batch.start + 5..batch.start + 13).contains(&at) => {}
            Err(seq) => assert_eq!(seq, Some(10), "bit {bit} of byte {at}: the first seq that is gone"),
            Ok(payloads) => {
                assert_eq!(payloads, image.payloads, "bit {bit} of byte {at} changed what is stored");
                harmless += 1;
            }
        }
    }
    // Part of a sequence number is all that may change without harm.
    assert!(harmless <= 16, "{harmless} of {} flips went unnoticed", batch.len());
}

#[tokio::test]
async fn a_zeroed_page_in_the_middle_is_reported() {
    let image = Image::make(600).await;
    let last = image.last();
    for page in 1..last.start / 4096 {
        let zeroed = image.with(true, |bytes| bytes[page * 4096..(page + 1) * 4096].fill(0)).await;
        // The batch that the page begins in is the first that is gone.
        let first = image.ends.iter().position(|end| *end > page * 4096).map(|seq| seq as u64);
        assert_eq!(zeroed, Err(first), "page {page} of {} zeroed", last.start / 4096);
    }
}

#[tokio::test]
async fn a_torn_tail_of_a_journal_that_another_follows_is_reported() {
    let image = Image::make(600).await;
    let journal = Image::journal(&image.dir);
    let number: u64 = journal.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    let bytes = fs::read(&journal).unwrap();
    let split = image.ends[9];
    fs::write(journal.with_file_name(format!("{}.jnl", number + 1)), &bytes[split..image.ends[19]]).unwrap();
    let open = |first: &[u8]| {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("store");
        copy(&image.dir, &dir);
        fs::write(dir.join("log").join(journal.file_name().unwrap()), first).unwrap();
        verify::verify(&dir, &mut |_, _| ControlFlow::Continue(())).unwrap().problems
    };
    assert_eq!(open(&bytes[..split]), []);
    assert_ne!(open(&bytes[..split - 1]), []);
    assert_ne!(open(&bytes[..image.ends[8]]), [], "a whole batch is missing before the second journal");
}

/// Every table below a directory.
fn tables(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(tables(&path));
        } else if path.parent().is_some_and(|parent| parent.ends_with("tables")) {
            found.push(path);
        }
    }
    found
}

/// The engine would set memory aside for two thousand million of them, and the process end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_whose_contents_promise_more_than_there_is_is_reported() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let mut config = Config::default();
    config.memtable_bytes = 256 * 1024;
    let store = FjallStore::open(&dir, config.clone()).unwrap();
    let mut log = Log::create(&store, "s", 1).await;
    for n in 0..300 {
        assert_eq!(log.append(&store, noise(n, 2000)).await, Outcome::Committed);
    }
    drop(store);
    let of_the_log = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.len() > 100_000);
    let table = tables(&dir).into_iter().find(of_the_log).expect("a table");
    let bytes = fs::read(&table).unwrap();
    let begin = u64::from_le_bytes(bytes[bytes.len() - 16..bytes.len() - 8].try_into().unwrap()) as usize;
    assert_eq!(&bytes[begin..begin + 4], b"TOC!");
    for bit in [0, 7, 24, 30, 31] {
        let mut broken = bytes.clone();
        broken[begin + 4 + bit / 8] ^= 1 << (bit % 8);
        fs::write(&table, broken).unwrap();
        let report = verify::verify(&dir, &mut |_, _| ControlFlow::Continue(())).unwrap();
        assert!(
            report.problems.iter().any(|problem| problem.what.contains("table of contents")),
            "bit {bit}: {report:?}"
        );
        let opened = FjallStore::open(&dir, config.clone()).map(drop);
        assert!(matches!(opened, Err(OpenError::Damaged(_))), "bit {bit}: {opened:?}");
    }
    // A file that was never finished is none of the store's.
    fs::write(&table, &bytes).unwrap();
    fs::write(table.with_file_name("999"), &bytes[..bytes.len() / 2]).unwrap();
    FjallStore::open(&dir, config).unwrap();
}

/// Flips a bit in the payload `needle`, which one of the tables holds.
fn flip_in_tables(dir: &Path, needle: &[u8]) -> bool {
    tables(dir).into_iter().any(|path| {
        let mut bytes = fs::read(&path).unwrap();
        let found = bytes.windows(needle.len()).position(|window| window == needle);
        if let Some(at) = found {
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        found.is_some()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_session_is_quarantined_and_the_others_go_on() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let mut config = Config::default();
    // One table, and nothing for a compaction to do: that stops the engine when it meets damage (ARCHITECTURE).
    config.memtable_bytes = 512 * 1024;
    let store = FjallStore::open(&dir, config.clone()).unwrap();
    let mut broken = Log::create(&store, "broken", 1).await;
    let mut whole = Log::create(&store, "whole", 2).await;
    let marked = noise(99, 64);
    for n in 0..200 {
        let payload = if n == 20 { marked.clone() } else { noise(n, 2000) };
        assert_eq!(broken.append(&store, payload).await, Outcome::Committed);
        assert_eq!(whole.append(&store, noise(n + 1000, 2000)).await, Outcome::Committed);
    }
    drop(store);
    assert!(flip_in_tables(&dir, &marked), "the marked record is in a table");

    let report = verify::verify(&dir, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let named = report.problems.iter().find(|problem| problem.session.as_deref() == Some("broken")).expect("named");
    assert!(named.seq.is_some_and(|seq| seq <= 20), "{named:?}");
    assert!(report.problems.iter().all(|problem| problem.session.as_deref() != Some("whole")), "{report:?}");

    for _ in 0..2 {
        let store = FjallStore::open(&dir, config.clone()).unwrap();
        let damaged = store.read(broken.id.clone(), ReadFrom::Seq(0), 1 << 20).await;
        assert!(matches!(damaged, Err(StoreError::Damaged { .. })), "{damaged:?}");
        let writer = Log::open(&store, broken.id.clone(), State::new(broken.id.incarnation)).await;
        assert!(matches!(writer, Err(StoreError::Damaged { .. })));

        let page = store.read(whole.id.clone(), ReadFrom::Seq(0), 8 << 20).await.unwrap();
        assert_eq!(page.tail, whole.state.tail());
        let state = core::mem::replace(&mut whole.state, State::new(whole.id.incarnation));
        whole = Log::open(&store, whole.id.clone(), state).await.unwrap();
        assert_eq!(whole.append(&store, b"goes on".to_vec()).await, Outcome::Committed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_found_while_a_session_is_appended_to_is_told_as_damage() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("store");
    let mut config = Config::default();
    config.memtable_bytes = 256 * 1024;
    let store = FjallStore::open(&dir, config.clone()).unwrap();
    let mut log = Log::create(&store, "s", 1).await;
    let marked = noise(99, 64);
    assert_eq!(log.append(&store, marked.clone()).await, Outcome::Committed);
    for n in 0..200 {
        assert_eq!(log.append(&store, noise(n, 2000)).await, Outcome::Committed);
    }
    drop(store);
    assert!(flip_in_tables(&dir, &marked));
    let store = FjallStore::open(&dir, config).unwrap();
    let mut log = Log::open(&store, log.id.clone(), log.state).await.unwrap();
    assert_eq!(log.append(&store, b"x".to_vec()).await, Outcome::Committed, "nobody has met the damage yet");
    assert!(store.read(log.id.clone(), ReadFrom::Seq(0), 1 << 20).await.is_err());
    let outcome = log.append(&store, b"y".to_vec()).await;
    assert!(matches!(outcome, Outcome::NotCommitted(StoreError::Damaged { .. })), "{outcome:?}");
    assert_eq!(store.resolve(&log.writer, log.next(b"y".to_vec())).await.ok(), None, "not even for reading back");
}

/// What a verification makes beside the store holds what the store holds: its owner alone may read it, and nothing of it stays,
/// however the verification ends.
#[tokio::test]
async fn the_copy_that_verification_works_on_is_private_and_does_not_stay() {
    use std::os::unix::fs::PermissionsExt;
    let image = Image::make(100).await;
    let parent = image.dir.parent().unwrap();
    let copies = || {
        let names = fs::read_dir(parent).unwrap().flatten().map(|entry| entry.path());
        names.filter(|path| path.file_name().unwrap().to_string_lossy().contains(".verify-")).collect::<Vec<_>>()
    };
    // One that a killed verification has left, and one that another works on.
    let (left, used) = (parent.join("crashed.verify-left"), parent.join("crashed.verify-used"));
    fs::create_dir_all(left.join("log")).unwrap();
    fs::File::create(left.join("in-use")).unwrap();
    fs::create_dir(&used).unwrap();
    let in_use = fs::File::create(used.join("in-use")).unwrap();
    in_use.try_lock().unwrap();
    let mut seen = 0;
    let report = verify::verify(&image.dir, &mut |_, _| {
        seen += 1;
        let [other, copy] = &copies()[..] else { panic!("{:?}", copies()) };
        for path in [other, copy].into_iter().filter(|path| **path != used) {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o077, 0, "{path:?} can be read by others");
        }
        if seen == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(report.unwrap().interrupted);
    assert_eq!((seen, copies()), (5, vec![used]));
}
