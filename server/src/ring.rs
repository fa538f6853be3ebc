//! The last chunks of a hot session, shared by everyone who follows it live.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mainstay_protocol::session::Chunk;

/// Bytes of a record of which nothing is known.
const ASSUMED: u64 = 64;

/// Contiguous chunks that end at the tail. Chunks without records are left out.
#[derive(Debug)]
pub(crate) struct Ring {
    chunks: VecDeque<Arc<Chunk>>,
    bytes: usize,
    limit: usize,
    total: Arc<AtomicUsize>,
    budget: usize,
    tail: u64,
}

impl Ring {
    /// An empty ring at `tail` of at most `limit` bytes. `total` counts the bytes of all rings; above `budget` each ring
    /// keeps only its last chunk.
    pub(crate) fn new(tail: u64, limit: usize, total: Arc<AtomicUsize>, budget: usize) -> Self {
        Self { chunks: VecDeque::new(), bytes: 0, limit, total, budget, tail }
    }

    /// First seq that is in memory.
    pub(crate) fn start(&self) -> u64 {
        self.chunks.front().map_or(self.tail, |chunk| chunk.first())
    }

    /// About how many bytes of chunks a reader at `seq` lacks; where they are not in memory, as many as if those were like these.
    pub(crate) fn behind(&self, seq: u64) -> u64 {
        let here = self.chunks.range(self.chunks.partition_point(|chunk| chunk.end() <= seq)..);
        let bytes: usize = here.map(|chunk| chunk.bytes().len()).sum();
        let (missing, known) = (self.start().saturating_sub(seq), self.tail.saturating_sub(self.start()));
        bytes as u64 + missing.saturating_mul((self.bytes as u64).checked_div(known).unwrap_or(ASSUMED))
    }

    /// Adds the newest chunk.
    pub(crate) fn push(&mut self, chunk: Arc<Chunk>) {
        if chunk.header().count == 0 {
            return;
        }
        let len = chunk.bytes().len();
        self.tail = chunk.end();
        self.bytes += len;
        let total = self.total.fetch_add(len, Ordering::Relaxed) + len;
        self.chunks.push_back(chunk);
        let limit = if total > self.budget { 0 } else { self.limit };
        while self.bytes > limit && self.chunks.len() > 1 {
            self.pop();
        }
    }

    /// Leaves out every chunk with records below `seq`: the store has them in another form.
    pub(crate) fn forget(&mut self, seq: u64) {
        while self.chunks.front().is_some_and(|chunk| chunk.first() < seq) {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(chunk) = self.chunks.pop_front() {
            self.bytes -= chunk.bytes().len();
            self.total.fetch_sub(chunk.bytes().len(), Ordering::Relaxed);
        }
    }

    /// Appends the chunks from the one that holds `seq` on, about `budget` bytes of them, to `out`.
    pub(crate) fn from(&self, seq: u64, budget: usize, out: &mut Vec<Arc<Chunk>>) {
        let start = self.chunks.partition_point(|chunk| chunk.end() <= seq);
        let mut left = budget;
        for chunk in self.chunks.range(start..) {
            out.push(chunk.clone());
            left = left.saturating_sub(chunk.bytes().len());
            if left == 0 {
                break;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use mainstay_protocol::session::{Author, Chain, CheckedBatch, ChunkBuilder, Incarnation, Record};
    use mainstay_protocol::wire::{Label, Writer};

    use super::*;

    /// One record of about so many bytes, at a seq.
    fn chunk(seq: u64, bytes: usize) -> Arc<Chunk> {
        let incarnation = Incarnation([1; 16]);
        let mut records = Writer::new();
        Record::data(0, vec![b'x'; bytes]).put(&mut records);
        let batch = CheckedBatch::new(1, records.freeze()).expect("a batch");
        let mut chunk = ChunkBuilder::new(incarnation, seq, seq, 1, 0, Chain::start(incarnation));
        chunk.batch(&Arc::new(Author::server()), &Label::new("p").expect("a label"), 1, seq, 0, &batch);
        Arc::new(chunk.finish().expect("a chunk"))
    }

    fn starts(rings: &[Ring]) -> Vec<u64> {
        rings.iter().map(Ring::start).collect()
    }

    /// Spec LIM-5: what is in memory is bounded for each session, and for all of them together.
    #[test]
    fn rings_keep_to_their_limit_and_all_of_them_to_their_budget() {
        let total = Arc::new(AtomicUsize::new(0));
        let one = chunk(0, 1000).bytes().len();
        let (limit, budget) = (4 * one + one / 2, 10 * one);
        let mut rings: Vec<Ring> = (0..4).map(|_| Ring::new(0, limit, total.clone(), budget)).collect();
        // The first two have what each of them may have.
        for ring in &mut rings[..2] {
            (0..20).for_each(|seq| ring.push(chunk(seq, 1000)));
        }
        assert_eq!(starts(&rings[..2]), [16, 16]);
        assert!(total.load(Ordering::Relaxed) <= 2 * limit);
        // Where all of them have more than is there, each keeps what comes last, and no more.
        for seq in 0..20 {
            rings.iter_mut().for_each(|ring| ring.push(chunk(20 + seq, 1000)));
            assert!(total.load(Ordering::Relaxed) <= budget + one, "{}", total.load(Ordering::Relaxed));
        }
        let held: u64 = rings.iter().map(|ring| ring.tail - ring.start()).sum();
        assert!((4..=10).contains(&held), "{held}");
        // What is left to the others once some are gone.
        rings.truncate(1);
        (40..60).for_each(|seq| rings[0].push(chunk(seq, 1000)));
        assert_eq!(starts(&rings), [56]);
        drop(rings);
        assert_eq!(total.load(Ordering::Relaxed), 0, "nothing is counted that is gone");
    }
}
