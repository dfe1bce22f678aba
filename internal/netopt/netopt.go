// Package netopt reads the options of a device as the command line has them, KEY=VALUE with commas between, in the same way and with the
// same words for all devices.
//
// # Theory of operation
//
// A device has a table of its keys, which says what each sets; what stands in front of the options, the kind and maybe a name, is the
// device's own business:
//
//	var keys = netopt.Keys[Options]{
//		{Name: "mtu", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.MTU, err = netopt.Number(v, 68, 9000); return }},
//	}
//
// Keys.Parse finds the key of every option, and wraps what is wrong so that it names the option. Number, OnOff and CheckInterface are
// for Set: their errors say what is wanted, without what was given, which Parse puts in front.
package netopt

import (
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MaxInterface is the length of the longest name of an interface, in bytes.
const MaxInterface = unix.IFNAMSIZ - 1

// Key is an option of a device, whose options together are a T.
type Key[T any] struct {
	Name  string
	Value string // what is to be given, for people
	Set   func(o *T, value string) error
	Bare  string // the value of an option without "="; "": it must have one
	Many  bool   // it may be given several times
}

// Keys are all options of a device, in the order in which they are listed to people.
type Keys[T any] []Key[T]

// String lists the keys for people.
func (ks Keys[T]) String() string {
	list := make([]string, len(ks))
	for i, k := range ks {
		list[i] = k.Name + "=" + k.Value
	}
	return strings.Join(list, ", ")
}

// Parse sets in o what the options say, and returns the keys that were given. It ends with the first error.
func (ks Keys[T]) Parse(o *T, options iter.Seq[string]) (given map[string]bool, err error) {
	given = map[string]bool{}
	for option := range options {
		name, value, ok := strings.Cut(option, "=")
		k := ks.find(name)
		if !ok && k != nil {
			value, ok = k.Bare, k.Bare != ""
		}
		switch {
		case !ok:
			return given, fmt.Errorf("%q: want KEY=VALUE, of %v", option, ks)
		case k == nil:
			return given, fmt.Errorf("unknown key %q: known are %v", name, ks)
		case given[name] && !k.Many:
			return given, fmt.Errorf("%s is given twice", name)
		}
		given[name] = true
		if err := k.Set(o, value); err != nil {
			return given, fmt.Errorf("%s=%s: %w", name, value, err)
		}
	}
	return given, nil
}

func (ks Keys[T]) find(name string) *Key[T] {
	for i := range ks {
		if ks[i].Name == name {
			return &ks[i]
		}
	}
	return nil
}

// Split returns the options between the commas of s, without empty ones.
func Split(s string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for option := range strings.SplitSeq(s, ",") {
			if option != "" && !yield(option) {
				return
			}
		}
	}
}

// Number reads a whole number from lo to hi.
func Number(s string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("want a number from %d to %d", lo, hi)
	}
	return n, nil
}

// OnOff reads "on", true, or "off".
func OnOff(s string) (bool, error) {
	if s != "on" && s != "off" {
		return false, errors.New("want on or off")
	}
	return s == "on", nil
}

// IsInterface reports whether an interface can have this name, by the kernel's rule (dev_valid_name).
func IsInterface(s string) bool {
	return s != "" && len(s) <= MaxInterface && s != "." && s != ".." && !strings.ContainsAny(s, "/: \t\n\v\f\r")
}

// CheckInterface is IsInterface, with the rule in the error.
func CheckInterface(s string) error {
	if !IsInterface(s) {
		return fmt.Errorf("%q is no interface name: want 1 to %d characters without blanks, slashes and colons", s, MaxInterface)
	}
	return nil
}
