//! What changes while a server serves: keys, issuers and certificates.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use mainstay_server::auth::SigningKey;
use mainstay_transport::quic::Showcase;
use tokio::signal::unix::Signal;

use super::Served;
use crate::failure::Failure;
use crate::settings::{Layers, Settings};

/// How often it is looked whether the files of the certificate are others.
const LOOK: Duration = Duration::from_secs(30);

/// Reads the configuration again at SIGHUP, and the certificate when its files change.
pub(super) struct Reload {
    layers: Layers,
    is_dev: bool,
    dev: Option<SigningKey>,
    showcase: Showcase,
    hangups: Signal,
    files: Vec<PathBuf>,
    changed: Vec<Option<SystemTime>>,
}

impl Reload {
    pub(super) fn new(
        layers: Layers,
        settings: &Settings,
        is_dev: bool,
        dev: Option<SigningKey>,
        showcase: Showcase,
        hangups: Signal,
    ) -> Self {
        let mut this = Self { layers, is_dev, dev, showcase, hangups, files: Vec::new(), changed: Vec::new() };
        this.follow(settings);
        this
    }

    fn follow(&mut self, settings: &Settings) {
        self.files = settings.identity_files().into_iter().map(PathBuf::from).collect();
        self.changed = self.times();
    }

    fn times(&self) -> Vec<Option<SystemTime>> {
        let time = |path: &PathBuf| std::fs::metadata(path).and_then(|file| file.modified()).ok();
        self.files.iter().map(time).collect()
    }

    /// Waits for changes, and puts them in force. Never returns.
    pub(super) async fn watch(&mut self, served: &[Served]) -> Infallible {
        loop {
            tokio::select! {
                hung_up = self.hangups.recv() => match hung_up {
                    Some(()) => match self.read(served) {
                        Ok(()) => tracing::info!("configuration read again: keys, issuers and certificate are in force"),
                        Err(failure) => {
                            tracing::error!(error = %failure, "configuration not taken; what was in force stays");
                        }
                    },
                    // There are no signals any more.
                    None => core::future::pending().await,
                },
                () = tokio::time::sleep(LOOK), if !self.files.is_empty() => {
                    let times = self.times();
                    if times != self.changed && times.iter().all(Option::is_some) {
                        match self.show() {
                            Ok(()) => {
                                self.changed = times;
                                tracing::info!("the certificate changed, and is shown to new connections");
                            }
                            // They may be written one after the other.
                            Err(failure) => tracing::warn!(error = %failure, "the certificate changed, and cannot be read"),
                        }
                    }
                }
            }
        }
    }

    fn show(&self) -> Result<(), Failure> {
        let settings = self.layers.read(std::env::vars())?;
        let identity = settings.identity(self.is_dev, &settings.data()?)?;
        self.showcase.show(identity).map_err(Failure::usage)
    }

    /// All of it or nothing.
    fn read(&mut self, served: &[Served]) -> Result<(), Failure> {
        let settings = self.layers.read(std::env::vars())?;
        settings.server(self.is_dev)?;
        let namespaces = settings.namespaces(self.is_dev)?;
        let anchors = settings.anchors(&namespaces, self.dev.as_ref())?;
        let identity = settings.identity(self.is_dev, &settings.data()?)?;
        self.showcase.show(identity).map_err(Failure::usage)?;
        let mut left: Vec<&str> = served.iter().map(|one| one.name.as_str()).collect();
        for (namespace, anchors) in namespaces.iter().zip(anchors) {
            match served.iter().find(|one| one.name == namespace.name) {
                Some(one) => one.trust.replace(anchors),
                None => tracing::warn!(namespace = namespace.name, "a new namespace is served from the next start on"),
            }
            left.retain(|name| *name != namespace.name);
        }
        for name in left {
            tracing::warn!(namespace = name, "it is not configured any more, and served until the next start");
        }
        self.follow(&settings);
        Ok(())
    }
}
