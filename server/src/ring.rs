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
