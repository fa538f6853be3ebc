//! What becomes of frames that gather because nobody takes them.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::CONTROL_RESERVE;
use mainstay_protocol::wire::Ping;
use mainstay_transport::{Outbox, SendStream, StreamError};
use tokio::sync::Notify;

/// A stream whose writes wait until they are let go, and that notes how it ended.
#[derive(Debug, Clone, Default)]
struct Gated {
    writing: Arc<Notify>,
    go: Arc<Notify>,
    ended: Arc<Mutex<Vec<String>>>,
}

impl SendStream for Gated {
    async fn write(&mut self, _pieces: &mut [Bytes]) -> Result<(), StreamError> {
        self.writing.notify_one();
        self.go.notified().await;
        Ok(())
    }

    fn set_priority(&self, _priority: i32) {}

    fn finish(&mut self) {
        self.ended.lock().expect("no panic").push("finished".into());
    }

    fn reset(&mut self, code: u64) {
        self.ended.lock().expect("no panic").push(Code(code).to_string());
    }

    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<> {
        core::future::pending()
    }
}

/// Runs an outbox into a stream while `meanwhile` happens during its first write; then lets that go. Returns how it ended.
async fn ends(meanwhile: impl FnOnce(&Outbox)) -> Vec<String> {
    let outbox = Outbox::default();
    let mut stream = Gated::default();
    let gate = stream.clone();
    outbox.push(Ping { nonce: 0, padding: None });
    tokio::join!(outbox.write_to(&mut stream), async {
        gate.writing.notified().await;
        meanwhile(&outbox);
        gate.go.notify_one();
    });
    let ended = gate.ended.lock().expect("no panic");
    ended.clone()
}

fn fill(outbox: &Outbox) {
    outbox.add(|w| w.raw(&vec![0; CONTROL_RESERVE + 1]));
}

#[tokio::test]
async fn an_outbox_that_is_closed_ends_its_stream_in_good_order() {
    assert_eq!(ends(Outbox::close).await, ["finished"]);
}

/// Spec FLOW-8.
#[tokio::test]
async fn an_outbox_that_overflows_gives_its_stream_up() {
    assert_eq!(ends(fill).await, ["CONTROL_BACKLOG"]);
}

/// Thrown-away frames looked like an orderly end.
#[tokio::test]
async fn an_outbox_that_overflows_and_is_closed_during_one_write_gives_its_stream_up() {
    let ended = ends(|outbox| {
        fill(outbox);
        outbox.close();
    });
    assert_eq!(ended.await, ["CONTROL_BACKLOG"]);
}
