//! Damaged data directories: reported, or nothing acknowledged is missing. Never silence, never another value, never a panic.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal, Write as _};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_client::{ClientError, Code, Config as ClientConfig, Event, Start};
use mainstay_protocol::session::{
    Author, CheckedBatch, ChunkBuilder, Incarnation, Instance, Operation, Record, SessionName, State,
};
use mainstay_protocol::wire::{Label, Subject, Writer};
use mainstay_server::auth::SigningKey;
use mainstay_store::{Outcome, ReadFrom, SessionId, Store};
use mainstay_store_fjall::{Config, FjallStore, OpenError, verify};
use mainstay_tests::harness::claims;
use mainstay_tests::process::{self, PATIENCE, Server, binary};
use mainstay_transport::sim::Random;

use crate::findings::Findings;

/// Seq and payload of every record that was acknowledged and is kept, by session.
pub type Stored = BTreeMap<String, Vec<(u64, Vec<u8>)>>;

/// A directory with some sessions, and what was acknowledged there.
#[derive(Debug)]
pub struct Image {
    /// The directory.
    pub dir: PathBuf,
    /// The same, as it was some time before: what an old backup of one file would bring back.
    pub earlier: PathBuf,
    /// What was acknowledged.
    pub stored: Stored,
    _temp: tempfile::TempDir,
}

impl Image {
    /// A store with some sessions, flushed tables, a journal, a trim and a deleted session.
    ///
    /// # Panics
    ///
    /// If the store does not work.
    pub async fn make() -> Self {
        let temp = tempfile::tempdir().expect("a directory");
        let (dir, earlier) = (temp.path().join("store"), temp.path().join("earlier"));
        let mut config = Config::default();
        config.memtable_bytes = 64 * 1024;
        let store = FjallStore::open(&dir, config).expect("open");
        let mut stored = Stored::new();
        for life in 0..4u8 {
            if life == 3 {
                copy(&dir, &earlier).expect("copy");
            }
            let (name, records) = fill(&store, life).await;
            if life == 3 {
                let id = store.stat(SessionName::new(&name).expect("a name")).await.expect("stat").expect("a session");
                store.delete(id.session).await.expect("delete");
            } else {
                stored.insert(name, records);
            }
        }
        drop(store);
        Self { dir, earlier, stored, _temp: temp }
    }

    /// Every file, relative to the directory.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        files(&self.dir, &mut found)?;
        found.sort();
        Ok(found.iter().filter_map(|path| path.strip_prefix(&self.dir).ok()).map(Path::to_owned).collect())
    }
}

async fn fill(store: &FjallStore, life: u8) -> (String, Vec<(u64, Vec<u8>)>) {
    let author = Arc::new(Author { subject: Subject::new("tester").expect("a subject"), instance: Instance([1; 16]) });
    let producer = Label::new("p").expect("a name");
    let name = format!("session:{life}");
    let session = SessionName::new(&name).expect("a name");
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
        let mut builder = ChunkBuilder::new(id.incarnation, tail, number, writer.epoch, 1000 + sequence, state.chain());
        builder.batch(&author, &producer, 1, sequence, 1000 + sequence, &batch);
        let chunk = Arc::new(builder.finish().expect("a chunk"));
        assert_eq!(store.append(&writer, chunk.clone(), None).await, Outcome::Committed);
        state.apply(&chunk).expect("follows");
    }
    store.put_snapshot(&writer, state.snapshot()).await.expect("a snapshot");
    if life == 2 {
        store.trim(&writer, 100).await.expect("a trim");
        records.retain(|(seq, _)| *seq >= 100);
    }
    (name, records)
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { files(&path, out)? } else { out.push(path) }
    }
    Ok(())
}

/// Copies a directory.
///
/// # Errors
///
/// Those of the file system.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
        } else if entry.file_type()?.is_file() {
            // Sockets of a server that was killed are nobody's.
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// What a damaged directory does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `verify` or the start said that it is damaged.
    Reported,
    /// Everything acknowledged is there.
    Intact,
}

/// Looks at a directory as an operator would: verify, then start.
///
/// # Errors
///
/// What is wrong: acknowledged data is missing or changed and nobody says so, or somebody says something else than that it is damaged.
pub async fn judge(dir: &Path, stored: &Stored) -> Result<Verdict, String> {
    let mut found = Stored::new();
    let report = verify::verify(dir, &mut |session, whole| {
        let verify::Found::Chunk { first, chunk, .. } = whole else { return ControlFlow::Continue(()) };
        for (seq, _, _, record) in chunk.records().flatten() {
            if seq >= first {
                found.entry(session.as_str().to_owned()).or_default().push((seq, record.payload.to_vec()));
            }
        }
        ControlFlow::Continue(())
    });
    match report {
        Ok(report) if report.problems.is_empty() => {}
        // The start reports it as damage too, or serves nothing that is wrong.
        Ok(_) => {
            return match FjallStore::open(dir, Config::default()) {
                Ok(store) => serves_nothing_wrong(&store, stored).await.map(|()| Verdict::Reported),
                Err(OpenError::Damaged(_) | OpenError::Version(_)) => Ok(Verdict::Reported),
                Err(error) => Err(format!("verify reports damage, the start something else: {error}")),
            };
        }
        Err(OpenError::Version(_)) => return Ok(Verdict::Reported),
        Err(error) => return Err(format!("verify cannot look: {error}")),
    }
    if found != *stored {
        return Err("acknowledged data is missing, and verify is silent".into());
    }
    match FjallStore::open(dir, Config::default()) {
        Ok(store) => serves_nothing_wrong(&store, stored).await.map(|()| Verdict::Intact),
        Err(error) => Err(format!("verify is content, but the store does not start: {error}")),
    }
}

/// Reads all that a store serves. Errors: a record is not one of those that were acknowledged at its seq, or one is missing and no error says so.
async fn serves_nothing_wrong(store: &FjallStore, stored: &Stored) -> Result<(), String> {
    for (name, records) in stored {
        let session = SessionName::new(name).map_err(|error| error.to_string())?;
        let stat = match store.stat(session).await {
            Ok(Some(stat)) => stat,
            Ok(None) => return Err(format!("{name} is served as if it had never been")),
            Err(_) => continue,
        };
        let mut next = stat.first;
        let begins = records.first().is_none_or(|(first, _)| next <= *first);
        let end = records.last().map_or(0, |(last, _)| last + 1);
        while let Ok(page) = store.read(stat.session.clone(), ReadFrom::Seq(next), 1 << 20).await {
            let Some(last) = page.chunks.last() else {
                if !begins || next < end {
                    return Err(format!(
                        "{name} is served from {} to {next} of {end}, and nothing says so",
                        stat.first
                    ));
                }
                break;
            };
            for record in page.chunks.iter().flat_map(|chunk| chunk.records()) {
                let (seq, _, _, record) = record.map_err(|error| error.to_string())?;
                let known = records.binary_search_by_key(&seq, |(known, _)| *known).ok();
                if seq >= stat.first && known.is_none_or(|at| records[at].1 != record.payload) {
                    return Err(format!("{name} serves another record at seq {seq}"));
                }
            }
            next = last.end();
        }
    }
    Ok(())
}

/// A data directory of the real server, keys, tickets and all, whose files are damaged one at a time between a kill and the next start.
struct Whole {
    server: Server,
    image: Image,
    /// A token that was revoked.
    revoked: String,
    /// Where the server's log is, and how much of it was looked at.
    log: PathBuf,
    read: usize,
}

/// Records of each of its sessions.
const LINES: u64 = 120;

impl Whole {
    async fn make() -> Self {
        let temp = tempfile::tempdir().expect("a directory");
        let (data, dir, earlier, log) = (
            temp.path().join("data"),
            temp.path().join("pristine"),
            temp.path().join("earlier"),
            temp.path().join("log"),
        );
        let mut server = Server::start_in(&data, &[]).await;
        server.log_to(log.clone());
        let key = fs::read_to_string(data.join("keys").join("signing")).expect("the key of the server's tokens");
        let key = SigningKey::from_paserk(&key).expect("a signing key");
        let revoked = key.mint(&claims("revoked", "", Operation::ALL)).expect("a token");
        let mut stored = Stored::new();
        for half in 0..2 {
            // Of two, so that an earlier list is another one.
            let subject = ["somebody", "revoked"][half as usize];
            let mut revoke = server.command(&["token", "revoke", "--subject", subject, "--data"]);
            revoke.arg(&data);
            let revoked = process::run(revoke).await;
            assert!(revoked.status.success(), "{subject} cannot be revoked: {revoked:?}");
            let client = server.client(ClientConfig::default());
            for name in ["one", "other"] {
                let records = stored.entry(name.to_owned()).or_default();
                let session = client.session(name).expect("a name").create().attach().await.expect("attach");
                let producer = session.producer("p").await.expect("a producer");
                for n in half * LINES / 2..(half + 1) * LINES / 2 {
                    let text = format!("{name}/{n}/").repeat(40).into_bytes();
                    let seq =
                        producer.append(session.main(), text.clone()).await.expect("append").await.expect("stored");
                    records.push((seq, text));
                }
            }
            drop(client);
            server.kill().await;
            if half == 0 {
                copy(&data, &earlier).expect("copy");
                server.restart().await;
            }
        }
        copy(&data, &dir).expect("copy");
        Self { server, image: Image { dir, earlier, stored, _temp: temp }, revoked, log, read: 0 }
    }

    /// Damages a file, and looks what `verify` and the server say. `None` if there was nothing to damage.
    async fn one(&mut self, random: &mut Random) -> Option<(String, Result<Verdict, String>)> {
        let data = self.server.dir().to_owned();
        fs::remove_dir_all(&data).expect("remove");
        copy(&self.image.dir, &data).expect("copy");
        let files = self.image.files().expect("files");
        let files: Vec<PathBuf> = files.into_iter().filter(|path| !path.ends_with("lock")).collect();
        let what = damage(&self.image, &data, &files, random).expect("damage")?;
        // Of keys and tickets `verify` says nothing.
        let of_store = what.starts_with("store/");
        let judged = self.judge(&data, of_store).await;
        self.server.kill().await;
        let log = fs::read(&self.log).expect("the log");
        let said = String::from_utf8_lossy(log.get(self.read..).expect("it grows"));
        self.read = log.len();
        // The engine panics on some damage, which is caught (`store/fjall`): what comes of it is looked at as everything else is.
        let ours =
            |line: &&str| line.contains("panicked at") && !line.contains("/fjall-") && !line.contains("/lsm-tree-");
        match said.lines().find(ours) {
            Some(line) => Some((what, Err(line.to_owned()))),
            None => Some((what, judged)),
        }
    }

    /// True if the server believes a token.
    async fn believes(&self, token: &str) -> bool {
        let mut config = ClientConfig::default();
        config.token = Some(token.to_owned());
        config.give_up_after = Some(PATIENCE);
        self.server.client(config).list("").await.is_ok()
    }

    async fn judge(&mut self, data: &Path, of_store: bool) -> Result<Verdict, String> {
        let mut verify = tokio::process::Command::new(binary());
        verify.args(["verify", "--json", "--data"]).arg(data);
        let verified = process::run(verify).await;
        let complains = match verified.status.code() {
            Some(0) => false,
            Some(DAMAGED) => true,
            other => return Err(format!("verify ended with {other:?}: {}", String::from_utf8_lossy(&verified.stderr))),
        };
        match self.server.try_restart().await {
            Ok(()) => {}
            Err((Some(DAMAGED), said)) if of_store && !complains => {
                return Err(format!("verify is silent, and the server does not start: {said}"));
            }
            Err((Some(DAMAGED), said)) if said.contains("\"code\":\"") => return Ok(Verdict::Reported),
            Err((code, said)) => return Err(format!("the server ended with {code:?}: {said}")),
        }
        if self.believes(&self.revoked).await {
            return Err("a token that was revoked is believed again".into());
        }
        let mut refused = false;
        for (name, records) in &self.image.stored {
            match tokio::time::timeout(PATIENCE, read(&self.server, name)).await {
                Ok(Ok(found)) if found == *records => {}
                Ok(Ok(found)) => {
                    return Err(format!(
                        "{name} is served with {} of {} records, or others",
                        found.len(),
                        records.len()
                    ));
                }
                Ok(Err(ClientError::Refused { code: Code::SESSION_DAMAGED, .. })) => refused = true,
                Ok(Err(error)) => return Err(format!("{name}: {error}")),
                Err(_) => return Err(format!("{name} cannot be read, and nothing says so")),
            }
        }
        if refused && !complains {
            return Err("verify is silent, and a session is not served".into());
        }
        Ok(if complains || refused { Verdict::Reported } else { Verdict::Intact })
    }
}

/// The exit code for damage, and of a server whose store failed.
pub(crate) const DAMAGED: i32 = 5;

/// Everything that a session has, from its beginning.
async fn read(server: &Server, name: &str) -> Result<Vec<(u64, Vec<u8>)>, ClientError> {
    let mut config = ClientConfig::default();
    config.give_up_after = Some(PATIENCE);
    let session = server.client(config).session(name)?.attach().await?;
    let mut subscription = session.subscribe(Start::Earliest).open().await?;
    let mut found = Vec::new();
    while let Some(event) = subscription.next().await {
        match event? {
            Event::Records(batch) => {
                for read in batch.iter() {
                    let read = read?;
                    found.push((read.seq, read.record.payload.to_vec()));
                }
            }
            Event::CaughtUp { .. } => break,
            _ => {}
        }
    }
    Ok(found)
}

/// The same with the real server and everything that is in its data directory.
async fn whole(images: u64, seed: u64) -> Findings {
    let mut whole = Whole::make().await;
    let (mut reported, mut intact, mut wrong) = (0, 0, Findings::default());
    let mut damaged = std::collections::BTreeSet::new();
    for number in 0..images {
        let mut random = Random::new(seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)));
        let Some((what, judged)) = whole.one(&mut random).await else { continue };
        damaged.insert(what.split([':', ' ']).next().unwrap_or_default().to_owned());
        match judged {
            Ok(Verdict::Reported) => reported += 1,
            Ok(Verdict::Intact) => intact += 1,
            Err(why) => wrong.tell(format!("data directory {number}: {what}: {why}")),
        }
    }
    let files = damaged.len();
    println!(
        "{images} data directories of the server, {files} files: {reported} reported, {intact} harmless, {} wrong",
        wrong.texts.len()
    );
    if images >= 50 && (reported == 0 || intact == 0) {
        wrong.tell("no damage of a data directory was reported, or none was harmless".into());
    }
    wrong
}

fn count(of: &AtomicU64) {
    of.fetch_add(1, Ordering::Relaxed);
}

const PAGE: usize = 4096;

/// Damages one file of a copy of the image in `dir`. Says what it did; `None` if there was nothing to damage.
///
/// # Errors
///
/// Those of the file system.
pub fn damage(image: &Image, dir: &Path, files: &[PathBuf], random: &mut Random) -> io::Result<Option<String>> {
    // One time in four a journal: what was written last is nowhere else.
    let journals: Vec<&PathBuf> = files.iter().filter(|file| file.extension().is_some_and(|of| of == "jnl")).collect();
    let file = match random.chance(0.25) && !journals.is_empty() {
        true => journals[random.below(journals.len() as u64) as usize],
        false => &files[random.below(files.len() as u64) as usize],
    };
    let target = dir.join(file);
    let mut bytes = fs::read(&target)?;
    // A journal is mostly unused space; damage there is not interesting.
    let used = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
    if used == 0 {
        return Ok(None);
    }
    let at = random.below(used as u64) as usize;
    let page = at / PAGE * PAGE;
    let end = bytes.len().min(page + PAGE);
    let other = random.below(used as u64) as usize / PAGE * PAGE;
    let what = match random.below(10) {
        0..3 => {
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} flipped")
        }
        3 => {
            bytes[page..end].fill(0);
            format!("page at {page} zeroed")
        }
        4 => {
            let sector = at / 512 * 512;
            let end = bytes.len().min(sector + 512);
            bytes[sector..end].iter_mut().for_each(|byte| *byte = random.bits() as u8);
            format!("sector at {sector} overwritten")
        }
        5 => {
            bytes.truncate(at);
            format!("cut off at {at}")
        }
        6 if other != page && other + PAGE <= bytes.len() && page + PAGE <= bytes.len() => {
            let copied = bytes[other..other + PAGE].to_vec();
            bytes[page..page + PAGE].copy_from_slice(&copied);
            format!("page at {page} is that at {other}")
        }
        7 => match fs::read(image.earlier.join(file)) {
            Ok(old) if old != bytes => {
                bytes = old;
                "as it was earlier".into()
            }
            _ => return Ok(None),
        },
        8 => {
            fs::remove_file(&target)?;
            return Ok(Some(format!("{} removed", file.display())));
        }
        _ => {
            bytes.truncate(used);
            bytes.extend((0..1 + random.below(600)).map(|_| random.bits() as u8));
            format!("bytes added at {used}")
        }
    };
    fs::write(&target, bytes)?;
    Ok(Some(format!("{}: {what}", file.display())))
}

/// Damages so many copies, on all cores. True if each was reported or harmless.
///
/// # Panics
///
/// If the file system fails.
pub fn run(images: u64, seed: u64) -> Findings {
    println!("repeat with cargo xtask campaign damage --seed {seed} --images {images}");
    let begun = std::time::Instant::now();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let image = runtime.block_on(Image::make());
    let files: Vec<PathBuf> =
        image.files().expect("files").into_iter().filter(|path| !path.ends_with("lock")).collect();
    let (next, reported, intact, nothing) =
        (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let wrong: Mutex<Findings> = Mutex::default();
    let one = |number: u64| {
        // Each image has a seed of its own, so that any of them can be made alone.
        let mut random = Random::new(seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)));
        let copied = image.dir.with_file_name(format!("copy-{number}"));
        copy(&image.dir, &copied).expect("copy");
        let what = damage(&image, &copied, &files, &mut random).expect("damage");
        let judged = what.map(|what| {
            let judged = catch_unwind(AssertUnwindSafe(|| runtime.block_on(judge(&copied, &image.stored))));
            (what, judged.unwrap_or_else(|_| Err("it panicked".into())))
        });
        fs::remove_dir_all(&copied).expect("remove");
        match judged {
            None => count(&nothing),
            Some((_, Ok(Verdict::Reported))) => count(&reported),
            Some((_, Ok(Verdict::Intact))) => count(&intact),
            Some((what, Err(why))) => {
                let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
                wrong.tell(format!("image {number}: {what}: {why}"));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= images {
                        return;
                    }
                    one(number);
                    if io::stderr().is_terminal() && number.is_multiple_of(50) {
                        eprint!("\r{number} of {images} images");
                        let _ = io::stderr().flush();
                    }
                }
            });
        }
    });
    let (reported, intact) = (reported.into_inner(), intact.into_inner());
    let mut wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{images} images: {reported} reported, {intact} harmless, {} without damage, {} wrong; {:.0} s",
        nothing.into_inner(),
        wrong.texts.len(),
        begun.elapsed().as_secs_f64()
    );
    if reported * 4 < images {
        wrong.tell("hardly any damage hit anything".into());
    }
    // A start of a process costs as much as thirty of an engine.
    if wrong.is_sound() {
        wrong.add(runtime.block_on(whole(images.div_ceil(30), seed)));
    }
    wrong
}
