//! mainstay-transport
