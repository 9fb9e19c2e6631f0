// Package criu reads and writes the files of CRIU image sets: the maps of memory
// pages, the pages themselves, and what of the other images a target must check
// before it lets CRIU act on them.
//
// Images from a stream are hostile: sizes are bounded before memory is taken, and
// pages are placed by a map that has been checked. Nothing here starts CRIU.
package criu
