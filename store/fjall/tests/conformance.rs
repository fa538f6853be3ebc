//! The contract on the embedded engine.

use std::sync::Arc;

use mainstay_store::Store;
use mainstay_store::testing::CASES;
use mainstay_store_fjall::{Config, FjallStore};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fjall_engine_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        let dir = tempfile::tempdir().expect("a directory");
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(dir.path(), Config::default()).expect("open"));
        case(store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_with_a_segment_for_every_chunk() {
    let mut config = Config::default();
    config.segment_bytes = 1;
    for (name, case) in CASES {
        println!("{name}");
        let dir = tempfile::tempdir().expect("a directory");
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(dir.path(), config.clone()).expect("open"));
        case(store).await;
    }
}
