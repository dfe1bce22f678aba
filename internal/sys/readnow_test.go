package sys

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadNow(t *testing.T) {
	fd, err := unix.Eventfd(3, unix.EFD_CLOEXEC) // which blocks
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b := make([]byte, 8)
	if n, err := ReadNow(fd, b); n != 8 || err != nil || b[0] != 3 {
		t.Errorf("%d bytes, %v: %x", n, err, b)
	}
	if n, err := ReadNow(fd, b); n != 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("of an empty counter: %d bytes, %v", n, err)
	}
}
