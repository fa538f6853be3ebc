//! How often something changed, for whoever follows it and need not look each time.

/// A count since the view is in memory; it is no part of the view, and equal to every other.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Changes(u64);

impl Changes {
    pub(super) fn add(&mut self) {
        self.0 += 1;
    }

    pub(super) fn count(self) -> u64 {
        self.0
    }
}

impl PartialEq for Changes {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Changes {}
