//! Backups and restorations that other processes ask for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_store_fjall::FjallStore;
use tokio::task::JoinHandle;

use crate::failure::Failure;
use crate::transfer::Transfer;

/// One at a time.
pub(super) struct Transfers {
    /// By their namespaces.
    stores: Vec<(String, Arc<FjallStore>)>,
    is_ending: Arc<AtomicBool>,
    running: Mutex<Option<JoinHandle<()>>>,
}

impl Transfers {
    pub(super) fn new(stores: Vec<(String, Arc<FjallStore>)>) -> Self {
        Self { stores, is_ending: Arc::default(), running: Mutex::default() }
    }

    pub(super) fn begin(&self, transfer: Transfer) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_some_and(|running| !running.is_finished()) {
            let why = "the server makes a backup or brings sessions back already; try again when that is done";
            return transfer.refuse(Failure { retryable: true, ..Failure::failed("BUSY", why) });
        }
        let Some((_, store)) = self.stores.iter().find(|(name, _)| *name == transfer.order.namespace) else {
            let known = self.stores.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let why = format!("no namespace is called {:?}; the server has {known}", transfer.order.namespace);
            return transfer.refuse(Failure::usage(why));
        };
        let (store, is_ending) = (store.clone(), self.is_ending.clone());
        let work = move || transfer.serve(&store, || is_ending.load(Ordering::Relaxed));
        *running = Some(tokio::task::spawn_blocking(work));
    }

    /// Nothing is begun any more, and what is being done ends soon.
    pub(super) fn stop(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Ends what is being done, so that the store can be closed.
    pub(super) async fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running
            && let Err(error) = running.await
        {
            tracing::error!(%error, "a backup or restoration ended by a panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use serde_json::Value;

    use mainstay_store_fjall::Config as StoreConfig;

    use super::*;
    use crate::local::hear;
    use crate::transfer::{Order, What};

    #[tokio::test]
    async fn one_backup_is_made_at_a_time_and_one_that_is_made_is_waited_for() {
        let temp = tempfile::tempdir().expect("a directory");
        let store = FjallStore::open(&temp.path().join("store"), StoreConfig::default()).expect("a store");
        let transfers = Transfers::new(vec![("default".to_owned(), Arc::new(store))]);
        let order = |namespace: &str| Order { namespace: namespace.to_owned(), what: What::Backup };
        let ask = || {
            let (ours, theirs) = UnixStream::pair().expect("a socket");
            let file = tempfile::tempfile().expect("a file");
            transfers.begin(Transfer { stream: theirs, order: order("default"), file });
            let answer = move || {
                let mut ours = ours;
                hear::<Value>(&mut ours).expect("an answer")
            };
            tokio::task::spawn_blocking(answer)
        };
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let running = tokio::task::spawn_blocking(move || assert!(ended.recv().is_err()));
        *transfers.running.lock().expect("no panic") = Some(running);
        assert_eq!(ask().await.expect("heard")["failed"]["code"], "BUSY");
        drop(end);
        let is_finished = || transfers.running.lock().expect("no panic").as_ref().is_none_or(JoinHandle::is_finished);
        while !is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(ask().await.expect("heard")["done"]["sessions"], 0);
        transfers.end().await;
    }
}
