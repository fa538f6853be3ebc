//! A session that tests append to.

use std::sync::Arc;

use mainstay_protocol::session::{
    Author, CheckedBatch, Chunk, ChunkBuilder, Incarnation, Instance, Record, SessionName, State,
};
use mainstay_protocol::wire::{Label, Subject, Writer};
use mainstay_store::{Outcome, SessionId, Store, StoreError, Writer as StoreWriter};
use mainstay_store_fjall::FjallStore;

/// A session that a test appends to.
pub(crate) struct Log {
    pub(crate) id: SessionId,
    pub(crate) writer: StoreWriter,
    pub(crate) state: State,
}

impl Log {
    pub(crate) async fn create(store: &FjallStore, name: &str, incarnation: u8) -> Self {
        let id = SessionId { name: SessionName::new(name).unwrap(), incarnation: Incarnation([incarnation; 16]) };
        store.create(id.clone(), 1000, 0).await.unwrap();
        Self::open(store, id, State::new(Incarnation([incarnation; 16]))).await.unwrap()
    }

    pub(crate) async fn open(store: &FjallStore, id: SessionId, state: State) -> Result<Self, StoreError> {
        let writer = store.open_writer(id.clone()).await?;
        Ok(Self { id, writer, state })
    }

    pub(crate) fn next(&self, payload: Vec<u8>) -> Arc<Chunk> {
        let author = Author { subject: Subject::new("tester").unwrap(), instance: Instance([1; 16]) };
        let mut region = Writer::new();
        Record::data(0, payload).put(&mut region);
        let batch = CheckedBatch::new(1, region.freeze()).unwrap();
        let state = &self.state;
        let mut builder = ChunkBuilder::new(
            state.incarnation(),
            state.tail(),
            state.number(),
            self.writer.epoch,
            1000 + state.number(),
            state.chain(),
        );
        builder.batch(&Arc::new(author), &Label::new("p").unwrap(), 1, state.tail(), 1000 + state.number(), &batch);
        Arc::new(builder.finish().unwrap())
    }

    pub(crate) async fn append(&mut self, store: &FjallStore, payload: Vec<u8>) -> Outcome {
        let chunk = self.next(payload);
        let outcome = store.append(&self.writer, chunk.clone(), None).await;
        if outcome == Outcome::Committed {
            self.state.apply(&chunk).unwrap();
        }
        outcome
    }
}

/// Bytes that hold no pattern of the journal.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            0x80 | (x >> 32) as u8
        })
        .collect()
}
