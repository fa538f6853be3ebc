//! mainstay-bench
