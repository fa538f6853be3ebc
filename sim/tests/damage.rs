//! The image that is damaged is whole, and each of its files is missed.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use mainstay_sim::damage::{Image, Verdict, copy, judge};
use mainstay_store_fjall::verify;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undamaged_directory_verifies_and_stays_byte_identical() {
    let image = Image::make().await;
    let read = || -> Vec<(PathBuf, Vec<u8>)> {
        let files = image.files().expect("files");
        files.into_iter().map(|path| (path.clone(), fs::read(image.dir.join(path)).expect("a file"))).collect()
    };
    let before = read();
    let report = verify::verify(&image.dir, &mut |_, _| ControlFlow::Continue(())).expect("verify");
    assert_eq!(report.problems, []);
    assert_eq!((report.sessions, report.records), (3, 900 - 100));
    assert!(read() == before, "verify changed the directory");
    assert_eq!(judge(&image.dir, &image.stored).await, Ok(Verdict::Intact));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_missing_file_is_reported() {
    let mut reported = 0;
    let image = Image::make().await;
    for (round, file) in image.files().expect("files").iter().enumerate() {
        if file.ends_with("lock") {
            continue;
        }
        let copied = image.dir.with_file_name(format!("copy-{round}"));
        copy(&image.dir, &copied).expect("copy");
        fs::remove_file(copied.join(file)).expect("remove");
        // A file that nothing refers to any more may be missed without harm.
        let verdict = judge(&copied, &image.stored).await;
        println!("{}: {verdict:?}", file.display());
        let superseded = file.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'));
        match verdict.unwrap_or_else(|why| panic!("{}: {why}", file.display())) {
            Verdict::Reported => reported += 1,
            // A list of tables that a newer one has replaced.
            Verdict::Intact => assert!(superseded && file.starts_with("log/keyspaces"), "{}", file.display()),
        }
        fs::remove_dir_all(&copied).expect("remove");
    }
    assert!(reported >= 10, "only {reported} of the files were missed");
}
