//! Damaged data directories: reported, or nothing acknowledged is missing. Never silence.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_protocol::session::{
    Author, CheckedBatch, ChunkBuilder, Incarnation, Instance, Record, SessionName, State,
};
use mainstay_protocol::wire::{Label, Subject, Writer};
use mainstay_store::{Outcome, ReadFrom, SessionId, Store};
use mainstay_store_fjall::{Config, FjallStore, OpenError, verify};
use mainstay_tests::random;

type Stored = BTreeMap<String, Vec<(u64, Vec<u8>)>>;

/// A store with some sessions, flushed tables, a journal, a trim and a deleted session; and what was acknowledged.
async fn fill(dir: &Path) -> Stored {
    let mut config = Config::default();
    config.memtable_bytes = 64 * 1024;
    let store = FjallStore::open(dir, config).expect("open");
    let author = Arc::new(Author { subject: Subject::new("tester").expect("a subject"), instance: Instance([1; 16]) });
    let name = Label::new("p").expect("a name");
    let mut stored = Stored::new();
    for life in 0..4u8 {
        let session = SessionName::new(&format!("session:{life}")).expect("a name");
        let id = SessionId { name: session, incarnation: Incarnation([life + 1; 16]) };
        store.create(id.clone(), 1000, 0).await.expect("create");
        let writer = store.open_writer(id.clone()).await.expect("a writer");
        let mut state = State::new(id.incarnation);
        let mut records = Vec::new();
        for sequence in 0..60u64 {
            let mut region = Writer::new();
            for n in 0..5u64 {
                let payload = format!("{life}/{sequence}/{n}/").into_bytes().repeat(20);
                records.push((state.tail() + n, payload.clone()));
                Record::data(0, payload).put(&mut region);
            }
            let batch = CheckedBatch::new(5, region.freeze()).expect("a batch");
            let (tail, number) = (state.tail(), state.number());
            let mut builder =
                ChunkBuilder::new(id.incarnation, tail, number, writer.epoch, 1000 + sequence, state.chain());
            builder.batch(&author, &name, 1, sequence, 1000 + sequence, &batch);
            let chunk = Arc::new(builder.finish().expect("a chunk"));
            assert_eq!(store.append(&writer, chunk.clone(), None).await, Outcome::Committed);
            state.apply(&chunk).expect("follows");
        }
        store.put_snapshot(&writer, state.snapshot()).await.expect("a snapshot");
        if life == 2 {
            store.trim(&writer, 100).await.expect("a trim");
            records.retain(|(seq, _)| *seq >= 100);
        }
        if life == 3 {
            store.delete(id).await.expect("delete");
        } else {
            stored.insert(format!("session:{life}"), records);
        }
    }
    stored
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        if entry.path().is_dir() {
            files(&entry.path(), out);
        } else {
            out.push(entry.path());
        }
    }
    out.sort();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}

/// What a damaged directory does.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// `verify` or the start said that it is damaged.
    Reported,
    /// Everything acknowledged is there.
    Intact,
}

/// Looks at a directory as an operator would: verify, then start.
///
/// # Panics
///
/// If acknowledged data is missing or changed and nobody says so.
fn judge(dir: &Path, stored: &Stored, what: &str) -> Verdict {
    let mut found = Stored::new();
    let report = verify::verify(dir, &mut |session, whole| {
        let verify::Found::Chunk { first, chunk, .. } = whole else { return ControlFlow::Continue(()) };
        for record in chunk.records() {
            let (seq, _, _, record) = record.expect("a verified record");
            if seq >= first {
                found.entry(session.as_str().to_owned()).or_default().push((seq, record.payload.to_vec()));
            }
        }
        ControlFlow::Continue(())
    });
    match report {
        Ok(report) if report.problems.is_empty() => {}
        Ok(_) => {
            // The start reports it as damage too, or serves nothing that is wrong.
            match FjallStore::open(dir, Config::default()) {
                Ok(store) => {
                    let serves = serves_nothing_wrong(&store, stored, what);
                    tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(serves));
                }
                Err(OpenError::Damaged(_) | OpenError::Version(_)) => {}
                Err(error) => panic!("{what}: verify reports damage, the start something else: {error}"),
            }
            return Verdict::Reported;
        }
        Err(OpenError::Version(_)) => return Verdict::Reported,
        Err(error) => panic!("{what}: verify cannot look: {error}"),
    }
    assert!(found == *stored, "{what}: acknowledged data is missing, and verify is silent");
    match FjallStore::open(dir, Config::default()) {
        Ok(_) => Verdict::Intact,
        Err(error) => panic!("{what}: verify is content, but the store does not start: {error}"),
    }
}

/// Reads all that a damaged store still serves.
///
/// # Panics
///
/// If a record is not one of those that were acknowledged at its seq, or the store says that a session ends where it did not.
async fn serves_nothing_wrong(store: &FjallStore, stored: &Stored, what: &str) {
    for (name, records) in stored {
        let name = SessionName::new(name).expect("a name");
        let Ok(Some(stat)) = store.stat(name.clone()).await else { continue };
        let mut next = stat.first;
        while let Ok(page) = store.read(stat.session.clone(), ReadFrom::Seq(next), 1 << 20).await {
            let Some(last) = page.chunks.last() else { break };
            for record in page.chunks.iter().flat_map(|chunk| chunk.records()) {
                let (seq, _, _, record) = record.expect("a record");
                let known = records.iter().find(|(known, _)| *known == seq);
                assert!(
                    seq < stat.first || known.is_some_and(|(_, payload)| *payload == record.payload),
                    "{what}: {name} serves another record at seq {seq}"
                );
            }
            next = last.end();
        }
    }
}

async fn filled() -> (tempfile::TempDir, PathBuf, Stored) {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("store");
    let stored = fill(&dir).await;
    (temp, dir, stored)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undamaged_directory_verifies_and_stays_byte_identical() {
    let (_temp, dir, stored) = filled().await;
    let image = |dir: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let mut paths = Vec::new();
        files(dir, &mut paths);
        paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("a file"))).collect()
    };
    let before = image(&dir);
    let report = verify::verify(&dir, &mut |_, _| ControlFlow::Continue(())).expect("verify");
    assert_eq!(report.problems, []);
    assert_eq!((report.sessions, report.records), (3, 900 - 100));
    assert!(image(&dir) == before, "verify changed the directory");
    assert_eq!(judge(&dir, &stored, "nothing"), Verdict::Intact);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_damage_is_reported_or_harmless() {
    const ROUNDS: u64 = 150;
    let mut random = random::for_test("random_damage");
    let (temp, dir, stored) = filled().await;
    let mut paths = Vec::new();
    files(&dir, &mut paths);
    let (mut reported, mut intact) = (0, 0);
    for round in 0..ROUNDS {
        let copied = temp.path().join(format!("copy-{round}"));
        copy(&dir, &copied);
        let path = &paths[random.below(paths.len() as u64) as usize];
        let target = copied.join(path.strip_prefix(&dir).expect("inside"));
        let mut bytes = fs::read(&target).expect("a file");
        // The journal is mostly unused space; damage there is not interesting.
        let used = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
        if used == 0 {
            continue;
        }
        let at = random.below(used as u64) as usize;
        let what = if random.chance(0.5) {
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} of {} flipped", path.display())
        } else {
            let page = at / 4096 * 4096;
            let end = bytes.len().min(page + 4096);
            bytes[page..end].fill(0);
            format!("page at {page} of {} zeroed", path.display())
        };
        fs::write(&target, bytes).expect("write");
        match judge(&copied, &stored, &what) {
            Verdict::Reported => reported += 1,
            Verdict::Intact => intact += 1,
        }
        fs::remove_dir_all(&copied).expect("remove");
    }
    println!("{reported} reported, {intact} harmless");
    assert!(reported > ROUNDS / 4, "hardly any damage hit anything");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_missing_file_is_reported() {
    let mut reported = 0;
    let (temp, dir, stored) = filled().await;
    let mut paths = Vec::new();
    files(&dir, &mut paths);
    for (round, path) in paths.iter().enumerate() {
        let relative = path.strip_prefix(&dir).expect("inside");
        if relative.ends_with("lock") {
            continue;
        }
        let copied = temp.path().join(format!("copy-{round}"));
        copy(&dir, &copied);
        fs::remove_file(copied.join(relative)).expect("remove");
        // A file that nothing refers to any more may be missed without harm.
        let verdict = judge(&copied, &stored, &format!("{} removed", relative.display()));
        println!("{}: {verdict:?}", relative.display());
        let superseded = relative.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'));
        match verdict {
            Verdict::Reported => reported += 1,
            // A list of tables that a newer one has replaced.
            Verdict::Intact => assert!(superseded && relative.starts_with("log/keyspaces"), "{}", relative.display()),
        }
        fs::remove_dir_all(&copied).expect("remove");
    }
    assert!(reported >= 10, "only {reported} of the files were missed");
}
