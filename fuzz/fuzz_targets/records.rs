//! Record regions: what is checked and accepted can be read, folded and written again.
#![no_main]

use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mainstay_protocol::session::{Author, CheckedBatch, Record, Records, View};
use mainstay_protocol::wire::{Reader, Writer};

fuzz_target!(|data: &[u8]| {
    let region = Bytes::copy_from_slice(data);
    let records: Result<Vec<Record>, _> = Records::new(&region).collect();
    let count = records.as_ref().map_or(1, |records| records.len() as u64);
    let Ok(_) = CheckedBatch::new(count, region.clone()) else { return };
    let records = records.expect("a checked batch can be read");
    let mut w = Writer::new();
    records.iter().for_each(|record| record.put(&mut w));
    assert_eq!(w.freeze(), region);
    let mut view = View::default();
    let author = Arc::new(Author::server());
    let mut r = Reader::new(&region);
    while !r.is_empty() {
        let record = r.bytes(usize::MAX).expect("a record");
        view.apply(&author, 1, &record).expect("a checked record folds");
    }
    assert_eq!(View::decode(&view.encode()).as_ref(), Ok(&view));
});
