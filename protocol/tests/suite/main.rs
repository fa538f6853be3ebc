//! The core from the outside: its rules against models, tables and limits. One program, which is built and linked once. What has an allocator
//! of its own, and what writes the golden vectors, is beside it.

mod compaction;
mod edges;
mod folded;
mod histories;
mod producers;
mod progress;
mod random;
mod registry;
mod roaming;
mod runs;
mod seed;
mod session;
mod staged;
mod tables;
mod view;
