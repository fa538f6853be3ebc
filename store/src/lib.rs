//! mainstay-store
