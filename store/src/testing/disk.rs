//! A store whose disk takes its time, fills up, fails, rots, and loses at a crash what it had not said to be durable.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::random::SplitMix;
use crate::contract::{
    Committing, Created, Health, ListPage, Outcome, Page, Pending, ReadFrom, SessionId, SessionStat, Store, StoreError,
    Writer,
};
use crate::memory::MemoryStore;

/// What a disk does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wear {
    /// How long a request takes at most.
    pub latency: Duration,
    /// In thousandths: a request that takes a hundred times as long.
    pub stalls: u32,
    /// In thousandths: an append of which it is not known what became.
    pub unknown: u32,
    /// In thousandths: a request that is refused because there is too much to do.
    pub overloaded: u32,
    /// No space: what writes is refused.
    pub full: bool,
}

impl Default for Wear {
    fn default() -> Self {
        Self { latency: Duration::from_millis(2), stalls: 0, unknown: 0, overloaded: 0, full: false }
    }
}

/// The model of the contract on a simulated disk, as one process uses it, in tokio's time and from a seed. Clones are the same process.
///
/// A request takes effect before the time is over that it takes, or behind it: so what a crash finds on its way is there afterwards or is
/// not, and only what was answered is certain. Of a chunk on its way a crash leaves nothing, all or the first bytes, and of a trim a part is
/// done at once. Bytes that are torn or rotten are read as a store reads them: what [`Chunk::decode`] does not take is not there, or damaged.
#[derive(Debug, Clone)]
pub struct SimulatedDisk {
    durable: MemoryStore,
    disk: Arc<Mutex<Disk>>,
    /// Which of the processes that had the disk one after the other.
    life: u64,
}

#[derive(Debug)]
struct Disk {
    wear: Wear,
    random: SplitMix,
    /// The process that has the disk.
    life: u64,
    failed: bool,
    /// Chunks of which a bit has changed, by incarnation and number, and which.
    rotten: BTreeMap<([u8; 16], u64), u64>,
    /// What is read in the place of chunks, by incarnation and number.
    forged: BTreeMap<([u8; 16], u64), Arc<Chunk>>,
    /// Chunks that are on their way and nowhere yet.
    pending: BTreeMap<u64, (Writer, Arc<Chunk>, Option<u64>)>,
    appends: u64,
    torn: u64,
    /// What this process has asked for, and whether it has asked for an append.
    asked: u64,
    appended: bool,
    /// Where those that are dead would be answered.
    unanswered: Vec<oneshot::Sender<Outcome>>,
}

/// When a request takes effect.
struct Fate {
    /// Before its time is over.
    early: bool,
    takes: Duration,
    refused: Option<StoreError>,
}

impl SimulatedDisk {
    /// An empty disk whose wear is decided by `seed`.
    pub fn new(seed: u64) -> Self {
        let (wear, random) = (Wear::default(), SplitMix(seed));
        let disk = Disk {
            wear,
            random,
            life: 0,
            failed: false,
            rotten: BTreeMap::new(),
            forged: BTreeMap::new(),
            pending: BTreeMap::new(),
            appends: 0,
            torn: 0,
            asked: 0,
            appended: false,
            unanswered: Vec::new(),
        };
        Self { durable: MemoryStore::new(), disk: Arc::new(Mutex::new(disk)), life: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the disk does from now on.
    pub fn set_wear(&self, wear: Wear) {
        self.lock().wear = wear;
    }

    /// The process that has the disk is dead: what is on its way and has not taken effect never will, and whatever is left of the process
    /// is never answered again. The next process, which finds a disk that works, has what this returns.
    pub fn crash(&self) -> Self {
        let mut disk = self.lock();
        disk.life += 1;
        (disk.failed, disk.asked, disk.appended) = (false, 0, false);
        for (writer, chunk, wake) in core::mem::take(&mut disk.pending).into_values() {
            let bytes = chunk.bytes();
            let written = match disk.random.below(3) {
                0 => 0,
                1 => bytes.len(),
                _ => 1 + disk.random.below(bytes.len() as u64 - 1) as usize,
            };
            disk.torn += u64::from((1..bytes.len()).contains(&written));
            if let Ok(whole) = Chunk::decode(bytes.slice(..written)) {
                drop(self.durable.append(&writer, Arc::new(whole), wake));
            }
        }
        Self { life: disk.life, ..self.clone() }
    }

    /// How much the process that has the disk has asked for, while it only looked at what it found: `None` once it appended.
    pub fn recovering(&self) -> Option<u64> {
        let disk = self.lock();
        (!disk.appended).then_some(disk.asked)
    }

    /// Of how many chunks a crash left a part.
    pub fn torn(&self) -> u64 {
        self.lock().torn
    }

    /// The disk fails: nothing is answered any more but errors, until the next crash.
    pub fn fail(&self) {
        self.lock().failed = true;
    }

    /// A bit of a chunk of the session changes, here or elsewhere in it.
    pub fn rot(&self, incarnation: Incarnation, number: u64) {
        let mut disk = self.lock();
        let bit = disk.random.below(u64::from(u32::MAX));
        disk.rotten.insert((incarnation.0, number), bit);
    }

    /// From now on this is read in the place of the chunk of its number.
    pub fn forge(&self, chunk: Arc<Chunk>) {
        let header = chunk.header();
        let place = (header.incarnation.0, header.number);
        self.lock().forged.insert(place, chunk);
    }

    fn fate(&self, writes: bool) -> Fate {
        let mut disk = self.lock();
        disk.asked += 1;
        let Wear { latency, stalls, overloaded, full, .. } = disk.wear;
        let (early, stalled) = (disk.random.below(2) == 0, disk.random.below(1000) < u64::from(stalls));
        let takes = Duration::from_micros(disk.random.below(latency.as_micros() as u64 + 1));
        let takes = if stalled { takes * 100 } else { takes };
        let busy = disk.random.below(1000) < u64::from(overloaded);
        let refused = match () {
            () if disk.failed => Some(StoreError::Failed { what: "the simulated disk failed".into() }),
            () if writes && full => Some(StoreError::NoSpace),
            () if writes && busy => Some(StoreError::Overloaded),
            () => None,
        };
        Fate { early, takes, refused }
    }

    /// True while the process lives and its disk works.
    fn works(&self) -> bool {
        let disk = self.lock();
        disk.life == self.life && !disk.failed
    }

    /// True once the process is dead.
    fn is_over(&self) -> bool {
        self.lock().life != self.life
    }

    /// What is read of a chunk.
    fn decay(&self, chunk: &Arc<Chunk>) -> Result<Arc<Chunk>, StoreError> {
        let place = (chunk.header().incarnation.0, chunk.header().number);
        let (forged, rotten) = {
            let disk = self.lock();
            (disk.forged.get(&place).cloned(), disk.rotten.get(&place).copied())
        };
        let Some(bit) = rotten else {
            return Ok(forged.unwrap_or_else(|| chunk.clone()));
        };
        let mut bytes = chunk.bytes().to_vec();
        let at = (bit / 8) as usize % bytes.len();
        bytes[at] ^= 1 << (bit % 8);
        let damaged = |error| StoreError::Damaged { seq: chunk.first(), what: format!("{error}") };
        Chunk::decode(bytes.into()).map(Arc::new).map_err(damaged)
    }

    /// A request that reads.
    fn read_with<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&MemoryStore) -> Pending<T> + Send + 'static,
    ) -> Pending<T> {
        if self.is_over() {
            return Box::pin(std::future::pending());
        }
        let (this, fate) = (self.clone(), self.fate(false));
        Box::pin(async move {
            sleep(fate.takes).await;
            if this.is_over() {
                std::future::pending::<()>().await;
            }
            match fate.refused {
                Some(error) => Err(error),
                None => ask(&this.durable).await,
            }
        })
    }

    /// A request that writes. It is on its way whether or not somebody waits for the answer.
    fn write_with<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&MemoryStore) -> Pending<T> + Send + 'static,
    ) -> Pending<T> {
        self.write_as(self.fate(true), ask)
    }

    fn write_as<T: Send + 'static>(
        &self,
        fate: Fate,
        ask: impl FnOnce(&MemoryStore) -> Pending<T> + Send + 'static,
    ) -> Pending<T> {
        if self.is_over() {
            return Box::pin(std::future::pending());
        }
        let this = self.clone();
        if let Some(error) = fate.refused {
            return Box::pin(async move {
                sleep(fate.takes).await;
                Err(error)
            });
        }
        let (answer, answered) = oneshot::channel();
        // The model does at once what it is asked for.
        let (early, late) = if fate.early { (Some(ask(&self.durable)), None) } else { (None, Some(ask)) };
        tokio::spawn(async move {
            sleep(fate.takes).await;
            let done = match (early, late) {
                (Some(done), _) => done.await,
                (None, Some(ask)) if this.works() => ask(&this.durable).await,
                _ => return,
            };
            if this.works() {
                // Nobody has to wait for it.
                let _ = answer.send(done);
            }
        });
        let this = self.clone();
        Box::pin(async move {
            match answered.await {
                Ok(done) => done,
                Err(_) if this.is_over() => std::future::pending().await,
                Err(_) => Err(StoreError::Failed { what: "the disk failed before it answered".into() }),
            }
        })
    }
}

impl Store for SimulatedDisk {
    fn create(&self, session: SessionId, created: u64, expire_after: u64) -> Pending<Created> {
        self.write_with(move |store| store.create(session, created, expire_after))
    }

    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>> {
        self.read_with(move |store| store.stat(name))
    }

    fn open_writer(&self, session: SessionId) -> Pending<Writer> {
        self.write_with(move |store| store.open_writer(session))
    }

    fn close_writer(&self, writer: Writer) {
        self.durable.close_writer(writer);
    }

    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing {
        if self.is_over() {
            let (answer, committing) = Committing::channel();
            self.lock().unanswered.push(answer);
            return committing;
        }
        self.lock().appended = true;
        let fate = self.fate(true);
        if let Some(error) = fate.refused {
            let certain = matches!(error, StoreError::NoSpace | StoreError::Overloaded);
            return Committing::ready(if certain { Outcome::NotCommitted(error) } else { Outcome::Unknown(error) });
        }
        let unknown = {
            let mut disk = self.lock();
            let often = disk.wear.unknown;
            (disk.random.below(1000) < u64::from(often)).then(|| disk.random.below(2) == 0)
        };
        if let Some(stored) = unknown {
            if stored {
                drop(self.durable.append(writer, chunk, wake));
            }
            return Committing::ready(Outcome::Unknown(StoreError::Overloaded));
        }
        let (answer, committing) = Committing::channel();
        let (this, writer) = (self.clone(), Writer { session: writer.session.clone(), epoch: writer.epoch });
        let early = fate.early.then(|| self.durable.append(&writer, chunk.clone(), wake));
        let number = {
            let mut disk = self.lock();
            disk.appends += 1;
            let number = disk.appends;
            if early.is_none() {
                disk.pending.insert(number, (writer, chunk, wake));
            }
            number
        };
        // It is on its way, whether or not somebody waits.
        tokio::spawn(async move {
            sleep(fate.takes).await;
            let pending = this.works().then(|| this.lock().pending.remove(&number)).flatten();
            let outcome = match (early, pending) {
                (Some(done), _) => Some(done.await),
                (None, Some((writer, chunk, wake))) => Some(this.durable.append(&writer, chunk, wake).await),
                (None, None) => None,
            };
            match outcome {
                Some(outcome) if this.works() => {
                    // Nobody has to wait for it.
                    let _ = answer.send(outcome);
                }
                // Of a disk that fails it is not known what became of it; of a process that is dead nobody is told.
                _ if this.is_over() => this.lock().unanswered.push(answer),
                _ => {}
            }
        });
        committing
    }

    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool> {
        let writer = Writer { session: writer.session.clone(), epoch: writer.epoch };
        self.read_with(move |store| store.resolve(&writer, chunk))
    }

    fn read(&self, session: SessionId, from: ReadFrom, budget: usize) -> Pending<Page> {
        let this = self.clone();
        self.read_with(move |store| {
            let read = store.read(session, from, budget);
            Box::pin(async move {
                let mut page = read.await?;
                for index in 0..page.chunks.len() {
                    match this.decay(&page.chunks[index]) {
                        Ok(chunk) => page.chunks[index] = chunk,
                        Err(damage) if index == 0 => return Err(damage),
                        Err(_) => {
                            page.chunks.truncate(index);
                            break;
                        }
                    }
                }
                Ok(page)
            })
        })
    }

    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()> {
        let writer = Writer { session: writer.session.clone(), epoch: writer.epoch };
        self.write_with(move |store| store.put_snapshot(&writer, state))
    }

    fn snapshot(&self, session: SessionId) -> Pending<Option<Bytes>> {
        self.read_with(move |store| store.snapshot(session))
    }

    fn trim(&self, writer: &Writer, before: u64) -> Pending<()> {
        let writer = Writer { session: writer.session.clone(), epoch: writer.epoch };
        let fate = self.fate(true);
        if fate.refused.is_none() && self.works() {
            let part = self.lock().random.below(before + 1);
            drop(self.durable.trim(&writer, part));
        }
        self.write_as(fate, move |store| store.trim(&writer, before))
    }

    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()> {
        let writer = Writer { session: writer.session.clone(), epoch: writer.epoch };
        self.write_with(move |store| store.compact(&writer, chunk))
    }

    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()> {
        let writer = Writer { session: writer.session.clone(), epoch: writer.epoch };
        self.write_with(move |store| store.set_compaction(&writer, compaction))
    }

    fn delete(&self, session: SessionId) -> Pending<()> {
        self.write_with(move |store| store.delete(session))
    }

    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>> {
        self.read_with(move |store| store.due(now, limit))
    }

    fn postpone(&self, session: SessionId, until: u64) -> Pending<()> {
        self.write_with(move |store| store.postpone(session, until))
    }

    fn expire(&self, session: SessionId, now: u64) -> Pending<bool> {
        self.write_with(move |store| store.expire(session, now))
    }

    fn set_wake(&self, session: SessionId, wake: Option<u64>) -> Pending<()> {
        self.write_with(move |store| store.set_wake(session, wake))
    }

    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>> {
        self.read_with(move |store| store.waking(until, after, limit))
    }

    fn list(&self, prefix: Vec<u8>, after: Vec<u8>, limit: usize) -> Pending<ListPage> {
        self.read_with(move |store| store.list(prefix, after, limit))
    }

    fn size(&self, session: SessionId) -> Pending<u64> {
        self.read_with(move |store| store.size(session))
    }

    fn health(&self) -> Health {
        let disk = self.lock();
        match (disk.failed, disk.wear.full) {
            (true, _) => Health::Failed { what: "the simulated disk failed".into() },
            (_, true) => Health::NoSpace,
            _ => Health::Serving,
        }
    }
}
