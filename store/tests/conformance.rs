//! The suite on the in-memory model, alone and behind faults.

use std::sync::Arc;

use mainstay_store::testing::{CASES, Faults, FaultyStore, SimulatedDisk, Wear};
use mainstay_store::{MemoryStore, Store};

#[tokio::test]
async fn the_memory_store_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(Arc::new(MemoryStore::new())).await;
    }
}

#[tokio::test]
async fn a_driver_that_repeats_and_resolves_gets_the_contract_from_a_faulty_store() {
    let faults = Faults {
        not_committed: 150,
        unknown_stored: 150,
        unknown_lost: 150,
        short_read: 300,
        overloaded: 200,
        trim_refused: 0,
    };
    for seed in 0..50 {
        for (name, case) in CASES {
            println!("{name} with seed {seed}");
            let store: Arc<dyn Store> = Arc::new(FaultyStore::new(MemoryStore::new(), faults, seed));
            case(store).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_simulated_disk_keeps_the_contract() {
    for seed in 0..20 {
        for (name, case) in CASES {
            println!("{name} with seed {seed}");
            let disk = SimulatedDisk::new(seed);
            disk.set_wear(Wear { stalls: 20, unknown: 100, overloaded: 100, ..Wear::default() });
            case(Arc::new(disk)).await;
        }
    }
}
